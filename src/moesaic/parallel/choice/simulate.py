"""The cost model on a cluster that is not there: static expert parallelism, each strategy, and what would be chosen.

W ranks · E experts · B blocks of experts · T tokens a rank · K slots per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moesaic.autotune.prior import Cost
from moesaic.errors import ConfigError
from moesaic.parallel.choice.candidates import exchanges, search
from moesaic.parallel.choice.clusters import Device, Wire, links
from moesaic.parallel.choice.compute import Compute, Overhead
from moesaic.parallel.choice.cost import PlanEstimate, Pricing
from moesaic.parallel.choice.volume import FloatArray
from moesaic.parallel.counts import message_bytes
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.plan import STRATEGIES, Plan, Wish
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import Workload

# Seconds to launch the kernels of one call of the experts, of order: a few kernels of some microseconds.
_LAUNCH = 2e-5
# Seconds on the host for a pass and for each chunk of it, Python and the launch of kernels: of the order that
# parallel/choice/overhead.py measures on two ranks of a CPU. Not measured on GPUs.
_OVERHEAD = Overhead(step=1e-3, chunk=6e-4)
# Seconds on the host for each of the W x E counts that all ranks tell each other, on a CPU of 2 cores: reading them,
# choosing, and finding out what to send took about 9 ms with 1,024 ranks and 2,048 experts, nearly all of it by counts.
_PLANNING = 6e-9
# Ranks whose routing is drawn; the others repeat theirs.
_DRAWN = 256
# What is simulated in a minute or so, and in the memory that there is.
MOST_RANKS = 4096
_MOST = {"num_experts": 1 << 13, "d_model": 1 << 20, "d_ff": 1 << 20, "tokens": 1 << 24}
_MOST_ZIPF = 10


@dataclass(frozen=True)
class Cluster:
    """Ranks on paper.

    Attributes:
        ranks, per_host: W, and how many of them are on one host.
        inside, between: links of a rank to those on its host, and to others.
        efficiency: share of the device's peak that the experts' matrix products reach.
        overhead: of the host, for every pass of every plan, plain expert parallelism too; nothing of it is hidden
            behind what devices do.
        planning: seconds of the host for each of W · E counts, before every step of what adapts.
    """

    ranks: int
    per_host: int
    inside: Wire
    between: Wire
    device: Device
    efficiency: float = 0.5
    overhead: Overhead = _OVERHEAD
    planning: float = _PLANNING

    def __post_init__(self) -> None:
        for name in ("ranks", "per_host"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.ranks > MOST_RANKS:
            raise ConfigError(f"ranks is {self.ranks}: a simulation has at most {MOST_RANKS}")
        if not 0 < self.efficiency <= 1:
            raise ConfigError(f"efficiency is {self.efficiency}: it must be above 0 and at most 1")
        if min(self.planning, self.overhead.step, self.overhead.chunk) < 0:
            raise ConfigError(f"planning is {self.planning} and overhead {self.overhead}: neither can be below 0")

    def topology(self) -> Topology:
        """Rank 0's view."""
        ranks = tuple(range(self.ranks))
        return Topology(0, self.ranks, ranks, tuple(rank // self.per_host for rank in ranks), "cpu")


@dataclass(frozen=True)
class Step:
    """One step of one layer with gated experts (three matrices), and how its tokens are routed.

    Attributes:
        num_experts, d_model, d_ff, top_k: E, D, F, K; tokens: T of each rank.
        dtype: of features and weights.
        zipf: the i-th most popular expert is chosen in proportion to 1 / i ** zipf; 0 is uniform.
        hot: share of all tokens that choose one certain expert, beside that; 0: none.
        grad: forward and backward.
    """

    num_experts: int
    d_model: int
    d_ff: int
    top_k: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    zipf: float = 0.0
    hot: float = 0.0
    grad: bool = True

    def __post_init__(self) -> None:
        for name in ("num_experts", "d_model", "d_ff", "top_k", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}: there are only {self.num_experts} experts")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name} is {getattr(self, name)}: a simulation has at most {most}")
        if not 0 <= self.zipf <= _MOST_ZIPF:
            raise ConfigError(f"zipf is {self.zipf}: it must be between 0 and {_MOST_ZIPF}")
        if not 0 <= self.hot <= 1:
            raise ConfigError(f"hot is {self.hot}: it must be between 0 and 1")

    def shares(self, random: np.random.Generator) -> FloatArray:
        """``[E]``: the share of the tokens that choose each expert; they add up to K."""
        share_E = np.arange(1, self.num_experts + 1, dtype=float) ** -self.zipf
        random.shuffle(share_E)  # so that popular experts are anywhere
        fixed_E = np.zeros(self.num_experts, dtype=bool)
        if self.hot:
            share_E[0], fixed_E[0] = self.hot, True
        while True:
            rest = self.top_k - share_E[fixed_E].sum()
            free = share_E[~fixed_E].sum()
            if free <= 0 or rest <= 0:
                return share_E
            share_E[~fixed_E] *= rest / free
            above_E = ~fixed_E & (share_E > 1)  # a token chooses an expert only once
            if not above_E.any():
                return share_E
            share_E[above_E], fixed_E[above_E] = 1.0, True

    def workload(self, ranks: int, seed: int = 0) -> Workload:
        """A drawn routing on so many ranks."""
        layout = ExpertLayout(self.num_experts, self.d_ff, ranks)
        random = np.random.default_rng(seed)
        share_E = self.shares(random)
        drawn = np.arange(ranks) % min(ranks, _DRAWN)
        slots = self.tokens * self.top_k
        counts_RE = random.multinomial(slots, share_E / share_E.sum(), size=min(ranks, _DRAWN)).clip(max=self.tokens)
        slots_RB = np.zeros((len(counts_RE), layout.blocks), dtype=np.int64)
        filled = [block for block in range(layout.blocks) if len(layout.experts_of_block(block))]
        starts = [layout.experts_of_block(block).start for block in filled]
        slots_RB[:, filled] = np.add.reduceat(counts_RE, starts, axis=1)
        # A token's K choices are nearly independent: the chance that none of them is in the block.
        wanted_RB = np.rint(self.tokens * (1 - (1 - slots_RB / slots) ** self.top_k)).astype(np.int64)
        rows_RB = np.clip(wanted_RB, -(-slots_RB // self.top_k), np.minimum(slots_RB, self.tokens))
        elements = [3 * self.d_model * len(layout.hidden_of(rank)) for rank in range(layout.slices)]
        return Workload(
            layout=layout,
            counts_WE=counts_RE[drawn],
            rows_WB=rows_RB[drawn],
            tokens_W=np.full(ranks, self.tokens),
            d_model=self.d_model,
            top_k=self.top_k,
            dtype=self.dtype,
            slice_elements=tuple(elements),
            grad=self.grad,
        )

    def compute(self, cluster: Cluster) -> Compute:
        """What a device takes by its published figures."""
        matrices = 3 * self.d_model * self.d_ff
        flops = cluster.device.tflops * 1e12 * cluster.efficiency
        memory = cluster.device.gbytes * 1e9
        forward = Cost(_LAUNCH, matrices * self.dtype.itemsize / memory, 2 * matrices / flops)
        # A copy reads and writes.
        return Compute(forward, forward.times(2), copy=2 / memory, overhead=cluster.overhead)


@dataclass(frozen=True)
class Simulated:
    """One point of a simulation.

    Attributes:
        static: plain expert parallelism: tokens travel, directly, in one chunk.
        best: of each strategy, by its name.
        counts: seconds of the exchange of counts, by which all ranks come to know enough to choose, and of
            :attr:`planning`; the static way does without, because its ranks only tell each other what they send.
        planning: seconds of choosing among what is known of this kind of step, and of finding out what to send. What is
            looked for only once, when a kind of step is met, is not in it.
    """

    cluster: Cluster
    step: Step
    static: PlanEstimate
    best: dict[str, PlanEstimate]
    counts: float
    planning: float = 0.0

    @property
    def auto(self) -> PlanEstimate:
        """What would be chosen."""
        return min(self.best.values(), key=lambda each: each.seconds)

    def speedup(self, estimate: PlanEstimate) -> float:
        """Against the static way, the counts exchange and planning included."""
        return self.static.seconds / (estimate.seconds + self.counts)


def simulate(cluster: Cluster, step: Step, seed: int = 0) -> Simulated:
    """Estimate every strategy's best plan for a drawn routing.

    Raises:
        ConfigError: for sizes that no cluster or layer has.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}: it must be at least 0")
    topology, workload = cluster.topology(), step.workload(cluster.ranks, seed)
    wires = links(cluster.inside, cluster.between)
    pricing = Pricing(workload, wires, step.compute(cluster), topology)
    names = exchanges(topology, Wish())
    static = pricing.estimate(Plan("tokens"))
    best = {strategy: search(pricing, Wish(strategy), names)[0][1] for strategy in STRATEGIES}
    near = min(cluster.per_host, cluster.ranks) - 1
    far = cluster.ranks - 1 - near
    # A ring hands every message on: each link carries all but one of them.
    slowest = wires.between if far else wires.inside
    latency = near * wires.inside.alpha + far * wires.between.alpha
    counts = wires.start + latency + (near + far) * message_bytes(workload.layout) * slowest.beta
    planning = cluster.planning * cluster.ranks * step.num_experts
    return Simulated(cluster, step, static, best, counts + planning, planning)
