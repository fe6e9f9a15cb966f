"""What a run says of itself while it goes: one line per step in ``metrics.jsonl``, and TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.layer import moe_layers
from moesaic.routing import LayerBalancing
from moesaic.train.board import EventFile
from moesaic.train.evaluate import DomainResult


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: steps done, this one included.
        loss: mean cross entropy in nats per token, float32; without the balancing losses.
        aux_loss: the balancing losses as they were added to it.
        balancing: each of them by its name, mean over the layers, before its coefficient.
        grad_norm: before clipping.
        imbalance: largest over mean number of rows per expert, mean over the layers; 1 is even. Experts that cost
            nothing are not looked at.
        worst_imbalance: that of the worst layer.
        dropped: share of the routed slots that lost their expert to a capacity limit.
        tokens: predicted so far.
        tokens_per_second: of this step.
    """

    step: int
    loss: float
    aux_loss: float
    learning_rate: float
    grad_norm: float
    imbalance: float
    worst_imbalance: float
    dropped: float
    tokens: int
    tokens_per_second: float
    balancing: Mapping[str, float] = field(default_factory=dict)


class RoutingMeter:
    """Load and drops of all MoE layers over the forwards of one step; reads them from the device once."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = moe_layers(model)
        self._counts: list[Tensor] = []
        self._dropped: list[Tensor] = []

    @torch.no_grad()
    def add(self) -> None:
        """Count the routing of the forward that has just been done."""
        for layer in self._layers:
            routing = layer.last_routing
            if routing is not None:
                self._counts.append(routing.counts())
                self._dropped.append(routing.counts().new_zeros(()) if routing.dropped is None else routing.dropped)

    @torch.no_grad()
    def take(self) -> list[float]:
        """Dropped slots, and rows per layer and expert, since the last call: numbers that ranks may add up."""
        if not self._counts:
            return []
        counts_LE = torch.stack(self._counts).view(-1, len(self._layers), self._counts[0].numel()).sum(0)
        taken: list[float] = torch.cat([torch.stack(self._dropped).sum().view(1), counts_LE.flatten()]).tolist()
        self._counts, self._dropped = [], []
        return taken

    def figures(self, taken: Sequence[float]) -> tuple[float, float, float]:
        """(imbalance, worst imbalance, dropped share) of what :meth:`take` gave; (1, 1, 0) without experts."""
        if not taken:
            return 1.0, 1.0, 0.0
        counts_LE = torch.tensor(taken[1:], dtype=torch.float64).view(len(self._layers), -1)
        loads_LE = counts_LE[:, : self._layers[0].config.num_experts]  # what comes after them costs nothing
        ratios_L = loads_LE.amax(1) / loads_LE.mean(1).clamp(min=1e-9)
        share = taken[0] / max(1.0, taken[0] + float(counts_LE.sum()))
        return float(ratios_L.mean()), float(ratios_L.max()), share


class BalanceMeter:
    """The balancing losses of a model's last forward, by their names."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = [module for module in model.modules() if isinstance(module, LayerBalancing)]
        self.names = self._parts[0].loss_names if self._parts else []
        self.over_batch = any(part.over_batch for part in self._parts)

    def read(self, device: torch.device) -> Tensor:
        """``[names]`` float32 on ``device``, mean over the layers, before the coefficients."""
        if not self.names:
            return torch.zeros(0, device=device)
        nothing = torch.zeros((), device=device)
        each = [torch.stack([part.losses.get(name, nothing).to(device) for part in self._parts]) for name in self.names]
        return torch.stack(each).float().mean(dim=1)


class NoLog:
    """Keeps nothing; what every rank but the first gets."""

    def step(self, metrics: StepMetrics) -> None:
        """A step has been done."""

    def validation(self, step: int, results: Mapping[str, DomainResult]) -> None:
        """The model has been measured."""

    def flush(self) -> None:
        """Everything so far to the files; raises :class:`OSError` where the disk is full."""

    def close(self) -> None:
        """Nothing more will come."""


class MetricsLog(NoLog):
    """``metrics.jsonl`` and ``tensorboard/`` in a run's folder.

    Args:
        folder: of the run.
        step: steps done before: what an earlier life of the run logged after them is taken back.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "metrics.jsonl"
        _take_back(path, step)
        self._lines = path.open("a", encoding="utf-8", buffering=1)  # by line: others may be watching
        self._board = EventFile(folder / "tensorboard", first_step=step + 1 if step else 0)

    def step(self, metrics: StepMetrics) -> None:
        values = asdict(metrics)
        self._write({"kind": "step", **values})
        plain = {name: value for name, value in values.items() if name not in ("step", "tokens", "balancing")}
        plain |= {f"balancing/{name}": value for name, value in metrics.balancing.items()}
        self._board.scalars(metrics.step, {f"train/{name}": value for name, value in plain.items()})

    def validation(self, step: int, results: Mapping[str, DomainResult]) -> None:
        for domain, result in results.items():
            self._write({"kind": "validation", "step": step, "domain": domain, **asdict(result)})
            self._board.scalars(
                step,
                {f"validation/loss/{domain}": result.loss, f"validation/perplexity/{domain}": result.perplexity},
            )
        self.flush()

    def flush(self) -> None:
        self._lines.flush()
        self._board.flush()

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._lines.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a kill cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _take_back(path: Path, step: int) -> None:
    if not path.exists():
        return
    # From the beginning means anew: even what was measured before the first step is measured again.
    kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
    making = path.with_suffix(".tmp")
    making.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    making.replace(path)
