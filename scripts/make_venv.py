"""Make ``.venv`` ready for development: ``python3.11 scripts/make_venv.py [EXTRA ...]`` (default extra: ``dev``).

Called by the Makefile; returns at once when nothing changed. What decides is a stamp inside ``.venv``:

* another Python, another ``TORCH=``, a moved folder or a broken environment: ``.venv`` is made anew;
* another ``pyproject.toml`` or ``constraints.txt``, one more extra, another C++ source, or a compiler where there was
  none: it is brought up to date in place.

The environment variable ``TORCH`` says which PyTorch is used, and is remembered:

* ``pinned`` (the start): the version of ``constraints.txt``; on Linux without an NVIDIA GPU only its CPU build;
* ``system``: the one that the calling Python already has, with everything else that it has;
* anything else: a wheel or a requirement for pip.

Standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"
PROJECT = ROOT / "pyproject.toml"
PINS = ROOT / "constraints.txt"
BUILD = ROOT / "setup.py"
NATIVE = ROOT / "src" / "moesaic" / "experts" / "native"


class SetupError(Exception):
    """What went wrong and what to do about it, in one line."""


def main(extras: list[str]) -> int:
    """Bring ``.venv`` up to date with ``extras``; the exit status."""
    leave_own_venv()
    started = time.monotonic()
    try:
        if sys.version_info < (3, 11):  # noqa: UP036  (whoever calls this need not have read pyproject.toml)
            raise SetupError(f"Python 3.11 or newer is needed, {sys.executable} is {version()}: set PYTHON=")
        if is_current(read_stamp(), extras):
            return 0
        # A second make that started meanwhile waits here, and then finds the work done.
        with PINS.open() as lock, contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
            stamp = read_stamp()
            if is_current(stamp, extras):
                return 0
            extras = sorted({*extras, *stamp.get("extras", [])})
            build(extras, anew=not is_usable(stamp))
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 2
    print(f"setup: .venv is ready ({time.monotonic() - started:.0f} s)", flush=True)
    return 0


def leave_own_venv() -> None:
    """Go on with the Python that ``.venv`` was made from, where ``.venv`` is active: it may be about to go."""
    if Path(sys.prefix).resolve() == VENV.resolve():
        base = sys._base_executable  # type: ignore[attr-defined]
        os.execv(base, [base, *sys.argv])


def read_stamp() -> dict[str, object]:
    """What ``.venv`` was made from; empty where there is none, or where its making was cut short."""
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return {}


def torch_choice(stamp: dict[str, object]) -> str:
    """``TORCH``, or what the environment was made with, so that it need not be said at every call."""
    choice = os.environ.get("TORCH") or str(stamp.get("torch") or "pinned")
    return str(Path(choice).resolve()) if Path(choice).is_file() else choice


def identity(stamp: dict[str, object]) -> dict[str, object]:
    """What cannot change without making the environment anew."""
    choice = torch_choice(stamp)
    python: object = f"{Path(sys._base_executable).resolve()} {version()}"  # type: ignore[attr-defined]
    if choice == "system":
        # A later plain ``make`` need not name the Python again, either.
        python = sys.executable if os.environ.get("TORCH") else stamp.get("python")
    return {"folder": str(VENV), "python": python, "torch": choice}


def inputs() -> str:
    """A fingerprint of the files that say what is installed, and of what is compiled."""
    sources = sorted(path for path in NATIVE.glob("*") if path.suffix in (".cpp", ".hpp", ".h"))
    told = b"".join(path.name.encode() + path.read_bytes() for path in (PROJECT, PINS, BUILD, *sources))
    compiler = any(map(shutil.which, ("g++", "c++", "clang++")))
    return hashlib.sha256(told + bytes([compiler])).hexdigest()


def is_current(stamp: dict[str, object], extras: list[str]) -> bool:
    """Whether there is nothing to do."""
    installed = stamp.get("extras")
    has_all = isinstance(installed, list) and set(extras) <= set(installed)
    return has_all and stamp.get("inputs") == inputs() and is_usable(stamp)


def is_usable(stamp: dict[str, object]) -> bool:
    """Whether the environment is of the wanted kind, and alive."""
    if {key: stamp.get(key) for key in ("folder", "python", "torch")} != identity(stamp):
        return False
    probe = "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ('torch', 'typer', 'moesaic'))))"
    try:
        return subprocess.run([VENV_PYTHON, "-c", probe], stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def build(extras: list[str], anew: bool) -> None:
    """Make or update the environment; the stamp is written last, so a half-made one is never taken for ready."""
    stamp = read_stamp()
    stamp = {**identity(stamp), "inputs": inputs(), "extras": extras}
    choice = str(stamp["torch"])
    if anew:
        if choice == "system":
            check_torch(system_version("torch"), f"{sys.executable} (set PYTHON= or TORCH=)")
        make_venv(choice)
        if choice == "system":
            see_system_packages()
    else:
        STAMP.unlink()
    if is_older(venv_version("setuptools") or "0", oldest("setuptools")):
        install(["--upgrade", pin("setuptools")])  # here, so that pip need not fetch it anew for every build
    if (anew and choice != "system") or (choice == "pinned" and not same_version(venv_version("torch"))):
        install_torch(choice)
    torch = venv_version("torch")
    check_torch(torch, f"TORCH={choice}")
    # A wheel is named by its exact version, so that nothing below ever replaces the torch that was chosen.
    dropped = {"torch", *borrowed_packages()}
    if not same_version(torch):
        dropped.add("triton")  # each torch for CUDA brings the one version that it was made with
    kept = [line for line in PINS.read_text().splitlines() if name_of(line) not in dropped]
    print(f"setup: installing moesaic with its extras {', '.join(extras)} (torch {torch})", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write("\n".join([*kept, f"torch=={torch}", ""]))
        pins.flush()
        install(["--no-build-isolation", "-c", pins.name, "-e", f"{ROOT}[{','.join(extras)}]"])
    compile_packages()
    STAMP.write_text(json.dumps(stamp, indent=2) + "\n")


def make_venv(choice: str) -> None:
    """An empty environment in place of whatever ``.venv`` is."""
    print(f"setup: making .venv with Python {version()}", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    # The calling Python's own pip serves where its packages are used, and where a distribution leaves out ensurepip.
    borrowed = util.find_spec("pip") and (choice == "system" or not util.find_spec("ensurepip"))
    pip = ["--without-pip"] if borrowed else []
    if subprocess.run([sys.executable, "-m", "venv", *pip, VENV], stdout=subprocess.DEVNULL).returncode:
        raise SetupError(f"{sys.executable} -m venv failed (its message is above)")


def same_version(torch: str | None) -> bool:
    """Whether ``torch`` is the pinned version, in whichever build."""
    return f"torch=={(torch or '').partition('+')[0]}" == pin("torch")


def install_torch(choice: str) -> None:
    """Install the torch that ``choice`` names, and nothing else yet."""
    if choice != "pinned":
        print(f"setup: installing {choice}", flush=True)
        install(["--no-deps", choice])
        return
    wanted = pin("torch")
    if sys.platform != "linux" or has_gpu():
        print(f"setup: installing {wanted}", flush=True)
        install(["--no-deps", wanted])
        return
    # pip fetches a whole wheel before it can tell what the wheel needs, a dry run too. So ask by name for what may be
    # fetched: only CPU builds carry this local version.
    print(f"setup: installing {wanted}+cpu", flush=True)
    try:
        install(["--no-deps", f"{wanted}+cpu"], quiet=True)
    except SetupError as error:
        if "No matching distribution" not in str(error):
            raise
        raise SetupError(
            f"pip finds no CPU build of {wanted}, and this machine has no GPU for the CUDA build: name PyTorch's index "
            "of CPU wheels in PIP_EXTRA_INDEX_URL (pytorch.org, Get Started), or set TORCH=system or TORCH=WHEEL"
        ) from None


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, judged without importing anything."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def see_system_packages() -> None:
    """Let the environment see what the calling Python sees, behind its own packages.

    Not ``--system-site-packages``: that shows the base Python's packages even where the calling one is an environment.
    """
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
    (site_packages() / "system.pth").write_text("\n".join(lines) + "\n")


def check_torch(found: str | None, where: str) -> None:
    """Refuse a torch that is too old, or none."""
    if found is None:
        raise SetupError(f"there is no torch in {where}")
    if is_older(found, oldest("torch")):
        raise SetupError(f"torch {found} of {where} is too old: at least {oldest('torch')} is needed")


def oldest(name: str) -> str:
    """The lower bound that ``pyproject.toml`` gives for ``name``."""
    found = re.search(rf'"{name}>=([0-9.]+)', PROJECT.read_text())
    assert found, f"pyproject.toml gives no lower bound for {name}"
    return found[1]


def is_older(found: str, bound: str) -> bool:
    """Compare versions by their first two numbers."""
    return [int(n) for n in re.findall(r"\d+", found)[:2]] < [int(n) for n in bound.split(".")[:2]]


def install(arguments: list[str], quiet: bool = False) -> None:
    """Run ``pip install`` for ``.venv``; ``quiet`` puts pip's complaint into the error instead of printing it."""
    has_pip = (site_packages() / "pip").is_dir()
    pip = [str(VENV_PYTHON), "-m", "pip"] if has_pip else [sys.executable, "-m", "pip", "--python", str(VENV_PYTHON)]
    # pip compiles one file at a time; compile_packages does it on all cores.
    options = ["-qq", "--no-compile", "--no-warn-conflicts", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "install", *options, *arguments], stderr=subprocess.PIPE if quiet else None, text=True)
    if done.returncode:
        raise SetupError(done.stderr if quiet else "pip failed (its message is above)")


def compile_packages() -> None:
    """Compile what pip installed; some packages carry files for other Pythons, so the exit status says nothing."""
    command = [VENV_PYTHON, "-m", "compileall", "-qq", "-j", "0", site_packages()]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def site_packages() -> Path:
    """Where ``.venv`` keeps its packages."""
    return next(VENV.glob("lib/python3*/site-packages"))


def borrowed_packages() -> set[str]:
    """Names of everything that ``.venv`` sees outside itself; a pin would only fetch a second copy."""
    ask = (
        "import sys; from importlib.metadata import distributions as all; "
        "print(*(d.name for d in all() if not str(d.locate_file('')).startswith(sys.prefix)))"
    )
    return {name_of(name) for name in run_in_venv(ask).split()} - {"moesaic"}


def system_version(name: str) -> str | None:
    """The version that the calling Python has, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def venv_version(name: str) -> str | None:
    """The version that ``.venv`` sees, or None."""
    return run_in_venv(f"from importlib.metadata import version; print(version({name!r}))").strip() or None


def run_in_venv(code: str) -> str:
    """What ``code`` prints in ``.venv``; empty where it fails."""
    return subprocess.run([VENV_PYTHON, "-c", code], capture_output=True, text=True).stdout


def pin(name: str) -> str:
    """The line of ``constraints.txt`` for ``name``, or the bare name."""
    return next((line for line in PINS.read_text().splitlines() if name_of(line) == name), name)


def name_of(requirement: str) -> str:
    """The normalized name that a requirement begins with."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=<>\[ ;]", requirement)[0]).lower()


def version() -> str:
    """The calling Python's version."""
    return ".".join(map(str, sys.version_info[:3]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["dev"]))
