"""``torchrun`` whose workers are forked from a server that has imported everything: a restart is seconds shorter.

It is torchrun itself, told to call a Python file (this one) in place of starting an interpreter: ``python -m
tests.train.launcher [options of torchrun] ARGUMENTS``, which are those of ``moesaic``. Each rank leaves the number of
its process in the folder ``PIDS`` of the environment.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

PRELOAD = ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "moesaic.train.run"]


def launch(arguments: list[str]) -> None:
    from torch.distributed import run

    multiprocessing.set_forkserver_preload([*PRELOAD, "moesaic.cli.main"])
    run.main(["--run-path", "--start-method", "forkserver", *arguments])


def work() -> None:
    from moesaic.cli.main import main

    path = Path(os.environ["PIDS"], os.environ["RANK"])
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").rename(path)
    main()


if __name__ == "__main__":
    if "RANK" in os.environ:
        work()
    else:
        at = sys.argv.index("train")
        launch([*sys.argv[1:at], __file__, *sys.argv[at:]])
