"""What every test gets: few threads, no network, and a block pool whose books still balance afterwards.

The environment is set before anything imports torch or transformers.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler

# --- hypothesis: reproducible by default, wide on request ------------------------------------------------

_SLOW_MACHINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None, suppress_health_check=_SLOW_MACHINE)
settings.register_profile("wide", max_examples=2000, deadline=None, suppress_health_check=_SLOW_MACHINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# --- the pool's books are checked after every test --------------------------------------------------------

_alive: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Managers and schedulers of earlier tests that still live (those of session fixtures)."""

_made_here: list[Any] = []
"""Those the current test made, held strongly so that they outlast its frame until they are checked."""


def _remember(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _made_here.append(self)

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def _watch_pools() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for cls in (KVCacheManager, Scheduler):
            patch.setattr(cls, "__init__", _remember(cls.__init__))
        yield


@pytest.fixture(autouse=True)
def pool_integrity(request: pytest.FixtureRequest, _watch_pools: None) -> Iterator[None]:
    """After each test: free + referenced == total, every id once, in each pool that the test made or used."""
    yield
    watched = [*_made_here, *_alive]
    _alive.update(_made_here)
    _made_here.clear()
    if request.node.get_closest_marker("broken_pool"):
        for item in watched:
            _alive.discard(item)
        return
    for item in watched:
        item.check_integrity()
