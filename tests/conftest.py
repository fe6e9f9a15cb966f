"""What holds for every test: no network, no state of the user's, the same numbers on every machine."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

# Before transformers is first imported, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# "auto" takes the same backend in every run; the tests of the tuner have tuners of their own.
os.environ["MOESAIC_TUNE"] = "off"
# Threads that wait for others let them run: spinning, two workers with two threads each are many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import settings

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# An example that takes long on a busy machine is no failure. In CI the same examples are drawn every time.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")


@pytest.fixture(autouse=True, scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of tokens: a folder of this test run, for subprocesses too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESAIC_CACHE", str(folder))
        yield folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which experts classes of transformers this run compared with their own code."""
    outcomes: dict[str, set[str]] = {"passed": set(), "failed": set()}
    for outcome, names in outcomes.items():
        for report in terminalreporter.stats.get(outcome, []):
            names |= {str(value) for key, value in report.user_properties if key == "compared with eager"}
    if covered := sorted(outcomes["passed"] - outcomes["failed"]):
        version = metadata.version("transformers")
        terminalreporter.write_sep("-", f"{len(covered)} experts classes of transformers {version} equal eager")
        terminalreporter.write_line(textwrap.fill(", ".join(covered), 110))
