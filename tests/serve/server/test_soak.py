"""The soak, for seconds instead of minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_a_short_soak(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", "--minutes", "0.3", "--clients", "16", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "soak.json").read_text())
    assert told["faults"] == []
    assert all(one["passed"] is not False for one in told["verdicts"])
    outcomes = {(kind, outcome) for kind, outcome, _ in told["outcomes"]}
    assert {("whole", "200"), ("stream", "200"), ("malformed", "400"), ("load", "201")} <= outcomes
    assert told["end"]["pages_used"] == told["end"]["slots_used"] == 0
