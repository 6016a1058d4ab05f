"""How much of the machine a run used: achieved GB/s and GFLOP/s beside the measured ceilings.

Steps fall in two phases. A decode step advances every request by one token and reads all weights for it, so memory
bounds it; a prefill step advances at least one request by several (others may decode along), so arithmetic usually
does. The binding ceiling of a phase is the one that alone would take longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mini_vllm.bench.ceilings import Ceilings
from mini_vllm.bench.cost import ModelShape, StepCost, step_cost
from mini_vllm.bench.driver import StepNote

PHASES = ("all", "decode", "prefill")


@dataclass(frozen=True)
class PhaseUse:
    """One phase of one run. ideal_seconds: with every step at the ceiling that binds it."""

    steps: int
    tokens: int
    seconds: float
    cost: StepCost
    read_seconds: float
    compute_seconds: float
    ideal_seconds: float

    def as_dict(self) -> dict[str, float | int | None]:
        """Rates and shares; None for all of them when the phase did not occur."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "gb_s": self._per_second(self.cost.num_bytes / 1e9),
            "gflop_s": self._per_second(self.cost.flops / 1e9),
            "read_share": self._per_second(self.read_seconds),
            "compute_share": self._per_second(self.compute_seconds),
            "roofline_share": self._per_second(self.ideal_seconds),
        }

    def _per_second(self, amount: float) -> float | None:
        return amount / self.seconds if self.seconds > 0 else None


def phase_of(chunks: Sequence[tuple[int, int]]) -> str:
    return "decode" if all(count == 1 for _, count in chunks) else "prefill"


def phase_uses(steps: Sequence[StepNote], shape: ModelShape, ceilings: Ceilings) -> dict[str, PhaseUse]:
    """{'all', 'decode', 'prefill'}: what each phase moved and computed, and how long it had to take at least."""
    costed = [(chunks := step.chunks, step, step_cost(shape, chunks, step.sampled_rows)) for step in steps]
    members = {phase: [item for item in costed if phase in ("all", phase_of(item[0]))] for phase in PHASES}
    return {phase: _use(items, ceilings) for phase, items in members.items()}


def _use(items: Sequence[tuple[list[tuple[int, int]], StepNote, StepCost]], ceilings: Ceilings) -> PhaseUse:
    read = [cost.num_bytes / (ceilings.read_gb_s * 1e9) for _, _, cost in items]
    compute = [cost.flops / (ceilings.gemm.gflop_s * 1e9) for _, _, cost in items]
    return PhaseUse(
        steps=len(items),
        tokens=sum(count for chunks, _, _ in items for _, count in chunks),
        seconds=sum(step.seconds for _, step, _ in items),
        cost=sum((cost for _, _, cost in items), StepCost()),
        read_seconds=sum(read),
        compute_seconds=sum(compute),
        ideal_seconds=sum(map(max, read, compute)),
    )


def flat_uses(uses: dict[str, PhaseUse]) -> dict[str, Any]:
    """One flat dict: `achieved_gb_s` ... for the whole run, `decode_gb_s` ..., `prefill_gb_s` ... for its phases."""
    flat: dict[str, Any] = {}
    for phase, use in uses.items():
        prefix = "achieved" if phase == "all" else phase
        flat |= {f"{prefix}_{name}": value for name, value in use.as_dict().items()}
    return flat


def binding_ceiling(read_share: float | None, compute_share: float | None, read_source: str) -> str | None:
    """'memory read', 'cache read' or 'compute': where the larger share is. None when the phase did not occur."""
    if read_share is None or compute_share is None:
        return None
    return f"{read_source} read" if read_share >= compute_share else "compute"
