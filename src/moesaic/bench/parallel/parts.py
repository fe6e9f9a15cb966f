"""The parts of the benchmark beside the grid, and all of them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from statistics import median

from moesaic.bench.parallel import against_tutel, grid, tutel
from moesaic.bench.parallel.lab import Setting
from moesaic.bench.parallel.ranks import started
from moesaic.bench.parallel.run import Run
from moesaic.bench.parallel.scale import run_scale
from moesaic.bench.parallel.sides import COMMUNICATION, COMPUTE
from moesaic.bench.parallel.work import Work
from moesaic.bench.part import Part
from moesaic.bench.report import milliseconds
from moesaic.bench.targets import Verdict
from moesaic.parallel.plan import AUTO, STRATEGIES

_SLOW = Setting(4, 1, 1.0)
_LINKS = (Setting(4, 1, 1.0), Setting(4, 1, 10.0), Setting(4, 1), Setting(1, 4))
_MEBIBYTES = 8


def run_links(run: Run) -> Part:
    """What the links carry as Gloo sees it."""
    rows = []
    for setting in run.possible(_LINKS):
        with started(setting) as ranks:
            found = ranks.ask({"task": "transfer", "mebibytes": _MEBIBYTES, "rounds": 9})
        run.tell(f"{setting}: {found['one_way'] / 1e9:.2f} Gbit/s")
        rates = (f"{found[name] / 1e9:.2f} Gbit/s" for name in ("one_way", "all_to_all"))
        rows.append((str(setting), *rates, f"{found['small'] * 1e6:.0f} µs"))
    header = ("ranks", f"{_MEBIBYTES} MiB one way", "each rank in an all-to-all", "64 bytes there and back")
    return Part("The links, through Gloo", header, rows, [], run.skipped(_LINKS))


# Fine-grained experts: four hosts compute on this machine's cores, so the wider one is, the less communication counts.
_HOT = tuple(Work(8192, 16, 1, 256, d_ff, "half", training) for d_ff in (64, 128) for training in (False, True))


def run_hot(run: Run) -> Part:
    """One expert that half of all slots want, at 1 Gbit/s."""
    rows, verdicts, lines = [], [], run.skipped((_SLOW,))
    for setting in run.possible((_SLOW,)):
        with started(setting) as ranks:
            for work in _HOT[:1] if run.quick else _HOT:
                told = ranks.ask({"task": "strategies", "work": asdict(work), "rounds": 5})
                found = {strategy: median(times) for strategy, times in told["times"].items()}
                ratio = found["tokens"] / found["hybrid"]
                run.tell(f"{work}: tokens / hybrid {ratio:.2f}, {told['chosen']}")
                name = f"F{work.d_ff}, {'training' if work.training else 'forward'}"
                cells = (milliseconds(found[strategy]) for strategy in (*STRATEGIES, AUTO))
                rows.append((name, *cells, f"{ratio:.2f}x"))
                lines.append(f"{name}: {told['chosen']['tokens']}; {told['chosen']['hybrid']}")
                verdicts.append(Verdict("hot", f"{setting}, {name}", "tokens / hybrid", 2.0, ratio))
    title = (
        f"One hot expert: {_SLOW}, 8192 tokens a rank, E16 K1 D256, fp32 SwiGLU, half of all slots to one expert; ms"
    )
    return Part(title, ("", *STRATEGIES, AUTO, "tokens / hybrid"), rows, verdicts, lines)


_OVERLAP = Setting(2, 1, 1.0)
_OVERLAPS = [1, 2, 4, 8]
_BALANCED = 384
# Computing is shorter than communication, about as long, and longer.
_OVERLAP_WORKS = tuple(
    Work(8192, 8, 1, 256, d_ff, "uniform", training) for training in (False, True) for d_ff in (128, _BALANCED, 1024)
)


def run_overlap(run: Run) -> Part:
    """Steps in chunks against the longer one of their two sides, at 1 Gbit/s."""
    rows, verdicts = [], []
    works = [work for work in _OVERLAP_WORKS if not run.quick or work.d_ff == _BALANCED]
    for setting in run.possible((_OVERLAP,)):
        with started(setting) as ranks:
            for work in works:
                question = {"task": "overlap", "work": asdict(work), "overlaps": _OVERLAPS, "rounds": 7}
                found = {name: median(each) for name, each in ranks.ask(question).items()}
                ideal = max(found[COMPUTE], found[COMMUNICATION])
                chunks = min(_OVERLAPS, key=lambda overlap: found[str(overlap)])
                reached = ideal / found[str(chunks)]
                run.tell(f"{work}, F{work.d_ff}: {reached:.0%} of the ideal with {chunks} chunks")
                told = f"F{work.d_ff}, {'training' if work.training else 'forward'}"
                columns = (COMPUTE, COMMUNICATION, *map(str, _OVERLAPS), AUTO)
                rows.append((told, *(milliseconds(found[name]) for name in columns), f"{reached:.0%} ({chunks})"))
                what = f"ideal / {chunks} chunks"
                verdicts.append(Verdict("overlap", f"{setting}, {told}", what, 0.7, reached, "%"))
    title = f"Overlap: {_OVERLAP}, tokens travel, 8192 tokens a rank, E8 K1 D256, fp32 SwiGLU; ms"
    names = ("1 chunk", *(f"{each} chunks" for each in _OVERLAPS[1:]))
    header = ("", COMPUTE, COMMUNICATION, *names, AUTO, "of max(compute, communication)")
    return Part(title, header, rows, verdicts, run.skipped((_OVERLAP,)))


_TWO_BY_TWO = (Setting(2, 2, 1.0), Setting(2, 2, 10.0), Setting(2, 4, 1.0), Setting(2, 8, 1.0))
_SIZES = [64, 256, 1024, 4096, 16384, 65536, 262144]


def run_exchanges(run: Run) -> Part:
    """Direct and hierarchical all-to-all, by the size of a message."""
    rows: list[tuple[str, ...]] = []
    halves: dict[str, list[float]] = {}
    settings = _TWO_BY_TWO[:1] if run.quick else _TWO_BY_TWO
    for setting in run.possible(settings):
        with started(setting) as ranks:
            told = ranks.ask({"task": "exchanges", "sizes": _SIZES, "rounds": 16 if run.quick else 60})
        for size, times in told.items():
            found = {name: median(each) for name, each in times.items()}
            halves[f"{setting}, {size} bytes"] = [
                median(times["direct"][half::2]) / median(times["hierarchical"][half::2]) for half in (0, 1)
            ]
            cells = (f"{found[name] * 1e6:.0f}" for name in ("direct", "hierarchical"))
            rows.append((str(setting), str(size), *cells, f"{found['direct'] / found['hierarchical']:.2f}x"))
        run.tell(f"{setting}: direct / hierarchical {', '.join(str(row[-1]) for row in rows[-len(_SIZES) :])}")
    verdicts = []
    if halves:
        # Where the win is, one half of the rounds says, and how large it is, the other half.
        best = max(halves, key=lambda name: halves[name][0])
        verdicts = [Verdict("exchange", best, "direct / hierarchical, best size", 1.0, halves[best][1])]
    header = ("ranks", "bytes from each rank to each", "direct, µs", "hierarchical, µs", "direct / hierarchical")
    return Part("All-to-all in one and in two dimensions", header, rows, verdicts, run.skipped(settings))


_TUTEL = (Setting(1, 2), Setting(1, 4))
_TUTEL_WORKS = tuple(
    Work(tokens, 16, 2, 256, 512, training=training) for tokens in (1024, 4096) for training in (False, True)
)
# Capacity factor, and what is added to one expert's logit.
_TUTEL_KINDS = {
    "no token dropped": (0.0, 0.0),
    "capacity factor 1": (1.0, 0.0),
    "one hot expert, none dropped": (0.0, 2.0),
}


def run_tutel(run: Run) -> Part:
    """Our layer against Tutel's."""
    if reason := tutel.missing():
        return Part("Against Tutel", (), [], [], [f"Tutel does not take part: {reason}"])
    rows, verdicts = [], []
    for setting in _TUTEL[:1] if run.quick else _TUTEL:
        with started(setting) as ranks:
            for work, (kind, (capacity, hot)) in _tutel_points(run.quick):
                question = {"task": "tutel", "work": asdict(work), "capacity_factor": capacity, "hot": hot, "rounds": 9}
                told = ranks.ask(question)
                ours, theirs = (median(told["times"][name]) for name in (against_tutel.OURS, against_tutel.TUTEL))
                name = f"{work.tokens} tokens, {'training' if work.training else 'forward'}, {kind}"
                run.tell(f"{setting}, {name}: Tutel / ours {theirs / ours:.2f}")
                errors = (f"{told['errors'][each]:.0e}" for each in (against_tutel.OURS, against_tutel.TUTEL))
                cells = (milliseconds(ours), milliseconds(theirs), f"{theirs / ours:.2f}x", *errors, told["chosen"])
                rows.append((str(setting), name, *cells))
                if not hot:
                    verdicts.append(Verdict("tutel", f"{setting}, {name}", "Tutel / ours", 1.3, theirs / ours))
    header = ("ranks", "a rank's step", "ours, ms", "Tutel, ms", "Tutel / ours", "error", "Tutel's", "our plan")
    return Part("Against Tutel: E16 K2 D256 F512, fp32 SwiGLU, gate included", header, rows, verdicts)


def _tutel_points(quick: bool) -> Iterable[tuple[Work, tuple[str, tuple[float, float]]]]:
    for work in _TUTEL_WORKS[:2] if quick else _TUTEL_WORKS:
        for kind in _TUTEL_KINDS.items():
            if kind[0] == "no token dropped" or (work.tokens == 1024 and not quick):
                yield work, kind


PARTS: dict[str, Callable[[Run], Part]] = {
    "links": run_links,
    "grid": grid.run_grid,
    "model": grid.run_model,
    "hot": run_hot,
    "overlap": run_overlap,
    "exchange": run_exchanges,
    "tutel": run_tutel,
    "scale": run_scale,
}
