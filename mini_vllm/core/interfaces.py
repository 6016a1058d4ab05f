"""What the control plane asks of others, as protocols: `core/` imports no implementation.

A rule is a constraint beside the token budget and the block pool (LoRA slots, encoder budget, state
alignment). It may shrink or refuse what a request would get this step, running requests included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mini_vllm.request import Request


@dataclass(frozen=True)
class KVCacheSpec:
    """Shape of one layer's cache. `kind` is 'full', 'sliding_window', 'mla' or 'mamba'.

    page_size_bytes: bytes of one block of one layer (K and V together).
    """

    block_size: int
    page_size_bytes: int
    dtype: str
    kind: str = "full"
    sliding_window: int | None = None


@dataclass(frozen=True)
class KVCacheGroup:
    """Layers that share one block table."""

    layer_names: tuple[str, ...]
    spec: KVCacheSpec


@dataclass(frozen=True)
class KVCacheConfig:
    """How the pool is cut: `num_blocks` ids (block 0 is the null block) over these groups."""

    num_blocks: int
    groups: tuple[KVCacheGroup, ...]

    @property
    def block_size(self) -> int:
        return self.groups[0].spec.block_size

    @property
    def bytes_per_block(self) -> int:
        return sum(len(group.layer_names) * group.spec.page_size_bytes for group in self.groups)


class AdmissionRule(Protocol):
    """A constraint on how far a request may advance this step."""

    def clamp(self, request: Request, start: int, num_tokens: int) -> tuple[int, str]:
        """(tokens allowed from position `start`, why fewer). No side effects."""

    def commit(self, request: Request, start: int, num_tokens: int) -> None:
        """The allocation succeeded: take what the request uses."""

    def refund(self, request: Request) -> None:
        """The request was preempted, aborted or finished: give back what it holds."""


class KVConnectorScheduler(Protocol):
    """The scheduler's half of KV transfer (vLLM's four calls)."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """(tokens that can be loaded beyond the local hit, whether the load is asynchronous)."""

    def update_state_after_alloc(self, request: Request, block_ids: Sequence[Sequence[int]], num_tokens: int) -> None:
        """Blocks for `num_tokens` external tokens were allocated."""

    def build_connector_meta(self, plan: Any) -> Any:
        """What the worker half needs for this plan."""

    def request_finished(
        self, request: Request, block_ids: Sequence[Sequence[int]]
    ) -> tuple[bool, dict[str, Any] | None]:
        """(keep the blocks until sending is done, parameters for the caller)."""


@dataclass(frozen=True)
class KVCacheEvent:
    """A block became findable (`stored`) or stopped being so (`removed`)."""

    kind: str
    block_id: int
    block_hash: bytes


class KVEventSink(Protocol):
    """Receives `KVCacheEvent`s in order (routers, offloading, tests)."""

    def __call__(self, event: KVCacheEvent, /) -> None: ...
