"""What attention layers look up while a forward runs, so that models pass no cache and no metadata around.

The model runner sets it around `model(...)`; each attention layer finds its own entry by its `prefix`. It is a
context variable: two engines in two threads do not see each other's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from mini_vllm.attention.backend import AttentionMetadata


@dataclass
class ForwardContext:
    """The step's attention metadata and the KV cache tensors, both keyed by layer prefix."""

    attn_metadata: dict[str, AttentionMetadata]
    kv_caches: dict[str, torch.Tensor]
    kv_connector: Any = None


_current: ContextVar[ForwardContext | None] = ContextVar("mini_vllm_forward_context", default=None)


@contextmanager
def set_forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` the current one inside the `with` block."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def get_forward_context() -> ForwardContext:
    """The current context. Raises RuntimeError outside `set_forward_context`."""
    context = _current.get()
    if context is None:
        raise RuntimeError("an attention layer ran outside set_forward_context(...)")
    return context
