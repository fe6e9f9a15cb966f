"""A rank of a measurement: ``python -m moesaic.bench.parallel.worker``, started by ``ranks.py`` as torchrun would.

Every rank reads the same questions, JSON lines of standard input, and does what they say together with the others;
rank 0 answers each with a JSON line. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

import torch
from torch import distributed

from moesaic.bench.parallel.tasks import TASKS

# Longer than any step; a rank that is gone ends the others.
_TIMEOUT = timedelta(seconds=120)


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=_TIMEOUT)
    distributed.barrier()
    _tell("ready", answers)
    for line in sys.stdin:
        question = json.loads(line)
        _tell(TASKS[question.pop("task")](**question), answers)


def _tell(answer: object, answers: object) -> None:
    if distributed.get_rank() == 0:
        print(json.dumps(answer), file=answers, flush=True)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
