"""Serve badly behaved clients for minutes: ``python benchmarks/soak.py [--minutes 10] [--clients 64] [--out FOLDER]``.

A small model is served by ``moesaic serve`` in a process of its own. Clients ask, stream, leave in the middle, send
nonsense; adapters come and go meanwhile; the KV cache and the queue are too small on purpose. Then everything must have
been given back: twice, after a first minute of warming up and at the end. Prints tables, writes ``soak.json``, and ends
with 1 where a target is missed. Memory is judged from 5 minutes on: before, caches of Python and PyTorch still fill.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesaic.bench.limits import machine
from moesaic.bench.report import make_folder, write
from moesaic.bench.soak.clients import AdapterMover, Client, Tally
from moesaic.bench.soak.model import CONTEXT, make_adapters, make_broken_adapters, make_model
from moesaic.bench.soak.process import ServerProcess
from moesaic.cli.output import print_table
from moesaic.errors import UsageError

ADAPTERS = [f"tuned-{i}" for i in range(6)]
MEMORY_LIMIT = 0.02
JUDGED_MINUTES = 5.0
REST_SECONDS = 60.0
MIB = 2.0**20


@dataclass
class Rest:
    """The server when nobody asks anything and no adapter is loaded."""

    running: int
    waiting: int
    pages_used: int
    slots_used: int
    adapters: int
    resident_mib: float


@dataclass
class Report:
    """What a soak found; ``samples``: seconds, MiB resident, running, waiting, pages and slots in use."""

    minutes: float
    clients: int
    tally: Tally = field(default_factory=Tally)
    samples: list[tuple[float, float, int, int, int, int]] = field(default_factory=list)
    warm: Rest | None = None
    end: Rest | None = None
    exit_code: int | None = None
    log: str = ""
    stats: dict[str, Any] = field(default_factory=dict)

    def drift_under_load(self) -> float:
        """Resident memory: median of the last tenth of the samples over that of the first, minus 1."""
        sizes = [sample[1] for sample in self.samples]
        tenth = max(1, len(sizes) // 10)
        return statistics.median(sizes[-tenth:]) / statistics.median(sizes[:tenth]) - 1

    def verdicts(self) -> list[tuple[str, str, bool | None]]:
        """(what, found, whether it is as it should be; None where that was not judged)."""
        assert self.warm is not None and self.end is not None
        at_rest, under_load = self.end.resident_mib / self.warm.resident_mib - 1, self.drift_under_load()
        long = self.minutes >= JUDGED_MINUTES
        rest = [self.warm, self.end]
        idle = all(one.running == one.waiting == one.adapters == 0 for one in rest)
        return [
            ("errors that are not the client's", str(self.tally.fault_count), not self.tally.fault_count),
            ("KV pages in use at rest", str(self.end.pages_used), not any(one.pages_used for one in rest)),
            ("expert slots in use at rest", str(self.end.slots_used), not any(one.slots_used for one in rest)),
            ("sequences and adapters at rest", "none" if idle else "some", idle),
            ("resident memory at rest", f"{at_rest:+.2%}", abs(at_rest) <= MEMORY_LIMIT if long else None),
            ("resident memory under load", f"{under_load:+.2%}", abs(under_load) <= MEMORY_LIMIT if long else None),
            ("exit code after SIGTERM", str(self.exit_code), self.exit_code == 0),
            ("tracebacks in its log", str(self.log.count("Traceback")), "Traceback" not in self.log),
        ]

    def document(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {
            "machine": machine(),
            "minutes": self.minutes,
            "clients": self.clients,
            "requests": self.tally.requests,
            "median_seconds": self.tally.median_seconds(),
            "outcomes": [[*key, count] for key, count in sorted(self.tally.outcomes.items())],
            "faults": self.tally.faults,
            "warm": asdict(self.warm) if self.warm else None,
            "end": asdict(self.end) if self.end else None,
            "stats": {key: self.stats[key] for key in ("steps", "preemptions", "requests", "tokens")},
            "samples": self.samples,
            "verdicts": [{"what": what, "found": found, "passed": ok} for what, found, ok in self.verdicts()],
        }


def main() -> int:
    """0 where every target that was judged is reached, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the clients go on")
    parser.add_argument("--clients", type=int, default=64, help="how many there are at any time")
    parser.add_argument("--seed", type=int, default=0, help="of what they ask")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder to write")
    options = parser.parse_args()
    if not (0 < options.minutes <= 1440 and 0 < options.clients <= 10_000):
        parser.error("--minutes is 1440 at most, --clients 10000, and both are above 0")
    try:
        make_folder(options.out)
        report = run(options.minutes, options.clients, options.seed)
    except UsageError as error:
        parser.error(str(error))
    tell(report)
    write(report.document(), options.out / "soak.json")
    return int(any(passed is False for _, _, passed in report.verdicts()))


def run(minutes: float, clients: int, seed: int) -> Report:
    """Make the model, serve it, let the clients in."""
    report = Report(minutes, clients)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(folder / "model")
        make_adapters(model, folder / "adapters", ADAPTERS)
        broken = make_broken_adapters(model, folder / "adapters", ADAPTERS[0])
        del model
        arguments = [str(folder / "model"), "--name", "soak", "--adapter-dir", str(folder / "adapters")]
        # 8 MiB are about 8,000 tokens: too few for 64 sequences, so that some must give way.
        arguments += ["--kv-gib", str(8 / 1024), "--max-queue", str(max(4, clients // 4))]
        with ServerProcess(arguments, folder / "log.txt") as server:
            asyncio.run(soak(server, report, broken, seed))
            report.exit_code = server.end()
            report.log = server.log()
    return report


async def soak(server: ServerProcess, report: Report, broken: list[str], seed: int) -> None:
    """A part to warm up, a rest, the soak itself, a rest."""
    mover = AdapterMover(server.wire, report.tally, ADAPTERS, broken, seed)
    seconds = 60 * report.minutes
    warm = min(60.0, 0.2 * seconds)
    for part, (duration, name) in enumerate([(warm, "warm"), (seconds - warm, "end")]):
        until = time.monotonic() + duration
        people = [
            Client(server.wire, report.tally, "soak", ADAPTERS, CONTEXT, seed + 10_000 * part + i)
            for i in range(report.clients)
        ]
        print(f"{report.clients} clients for {duration:.0f} s", file=sys.stderr, flush=True)
        watching = asyncio.create_task(watch(server, report)) if name == "end" else None
        try:
            await asyncio.gather(mover.run(until), *(one.run(until) for one in people))
        finally:
            if watching is not None and not watching.cancel():
                watching.result()  # it has ended before: the server has
        await mover.unload_all()
        setattr(report, name, await rest(server))
    report.stats = await server.stats()


async def watch(server: ServerProcess, report: Report) -> None:
    """A sample every second."""
    start = time.monotonic()
    while True:
        told = await server.stats()
        numbers = (
            told["requests"]["running"],
            told["requests"]["waiting"],
            told["pages"]["used"],
            told["slots"]["used"],
        )
        report.samples.append((round(time.monotonic() - start, 1), server.resident_bytes() / MIB, *numbers))
        await asyncio.sleep(1)


async def rest(server: ServerProcess) -> Rest:
    """What is left a little after the last client has gone."""
    until = time.monotonic() + REST_SECONDS
    while True:
        told = await server.stats()
        requests, pages, slots = told["requests"], told["pages"]["used"], told["slots"]["used"]
        left = (requests["running"], requests["waiting"], pages, slots, len(told["adapters"]))
        if not any(left) or time.monotonic() > until:
            return Rest(*left, resident_mib=server.resident_bytes() / MIB)
        await asyncio.sleep(0.2)


def tell(report: Report) -> None:
    """Print what was found."""
    tokens = report.stats["tokens"]["generated"]
    print_table(
        f"{report.tally.requests:,} requests of {report.clients} clients in {report.minutes:g} min, {tokens:,} tokens, "
        f"{report.stats['preemptions']:,} preemptions",
        ("request", "outcomes"),
        report.tally.rows(),
    )
    words = {True: "yes", False: "NO", None: f"judged from {JUDGED_MINUTES:g} min on"}
    rows = [(what, found, words[passed]) for what, found, passed in report.verdicts()]
    print_table("Targets", ("what", "found", "reached"), rows)
    for fault in report.tally.faults:
        print(fault)


if __name__ == "__main__":
    sys.exit(main())
