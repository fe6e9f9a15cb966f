"""What merging does to quality, in miniature: ``python benchmarks/merging.py [--models FOLDER] [--out FOLDER]``.

Trains a byte-level model of 0.4 M parameters on the standard library's code and prose, fine-tunes it on each, merges
both in every way, and measures all of them on held-out text: about six minutes on one core. What is in the folder of
models is not trained again, so that an interrupted run goes on. Writes ``merging.json``, and the table into
docs/conversion.md between its marks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moesaic.bench.limits import machine
from moesaic.bench.merging import Sizes, library_texts, measure
from moesaic.bench.report import make_folder
from moesaic.bench.results import add, read, section
from moesaic.cli.output import print_table
from moesaic.errors import UsageError

FILE, PAGE = "merging.json", Path(__file__).resolve().parent.parent / "docs" / "conversion.md"
BEGIN, END = "<!-- merges: made by benchmarks/merging.py -->\n", "<!-- end of merges -->\n"


def page(text: str, measured: str) -> str:
    """The page with what was measured between its marks; as it is where it has none."""
    if BEGIN not in text or END not in text:
        return text
    return text[: text.index(BEGIN)] + BEGIN + "\n" + measured + "\n" + text[text.index(END) :]


def main() -> int:
    """0, or 130 where it was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("build/merging"), help="the folder to keep models in")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder to write")
    options = parser.parse_args()
    try:
        make_folder(options.out)
        make_folder(options.models)
    except UsageError as error:
        parser.error(str(error))
    sizes = Sizes()
    try:
        part = measure(
            options.models,
            library_texts(sizes),
            sizes,
            lambda line: print(f"making {line}", file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        return 130
    print_table(part.title, part.header, part.rows)
    for line in part.lines:
        print(line)
    add("merging", part, machine(), {}, options.out / FILE)
    # Its first lines say how many targets were reached: there are none.
    measured = section(read(options.out / FILE))
    PAGE.write_text(page(PAGE.read_text(), measured[measured.index("**") :]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
