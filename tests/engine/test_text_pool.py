"""Claims about threads for work on text: off the event loop, within a time limit, and never stuck for good."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from mini_vllm.engine import text_pool
from mini_vllm.engine.text_pool import TextPool
from mini_vllm.exceptions import EngineDeadError, InvalidParameterError, OverloadedError


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets work that waits for it end, at the latest when the test does."""
    event = threading.Event()
    yield event
    event.set()


async def until(condition: object) -> None:
    while not condition():  # type: ignore[operator]
        await asyncio.sleep(0.001)


async def test_work_runs_in_another_thread_and_its_result_or_error_comes_back() -> None:
    pool = TextPool()
    assert await pool.run(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await pool.run(lambda: next(iter(())))
    with pytest.raises(RuntimeError, match="SystemExit: panic"):
        await pool.run(lambda: exec("raise SystemExit('panic')"))
    pool.shutdown()


async def test_work_that_takes_too_long_is_refused_and_its_thread_replaced(release: threading.Event) -> None:
    pool = TextPool(timeout=0.05)
    stuck = [asyncio.create_task(pool.run(release.wait)) for _ in range(3)]
    *ran, waited = await asyncio.gather(*stuck, return_exceptions=True)
    for result in ran:
        assert isinstance(result, InvalidParameterError) and result.field == "prompt" and "0.05 s" in str(result)
    assert isinstance(waited, OverloadedError)  # it is not at fault
    assert await pool.run(lambda: "served") == "served"
    release.set()
    await until(lambda: pool._num_lost == 0)
    pool.shutdown()


async def test_work_whose_caller_went_away_still_gives_its_thread_up_in_time(release: threading.Event) -> None:
    pool = TextPool(timeout=0.2)
    begun: list[int] = []
    stuck = [asyncio.create_task(pool.run(lambda: (begun.append(1), release.wait()))) for _ in range(2)]
    await until(lambda: len(begun) == 2)
    for task in stuck:
        task.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
    await until(lambda: pool._num_lost == 2)
    pool.timeout = 30.0  # a busy machine may take its time for the new thread
    assert await pool.run(lambda: "served") == "served"
    release.set()
    pool.shutdown()


async def test_work_that_nobody_waits_for_any_more_is_not_begun(release: threading.Event) -> None:
    pool = TextPool(timeout=5.0)
    blocking = [asyncio.create_task(pool.run(release.wait)) for _ in range(2)]
    begun: list[int] = []
    unwanted = asyncio.create_task(pool.run(lambda: begun.append(1)))
    await asyncio.sleep(0.01)
    unwanted.cancel()
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(*blocking, pool.run(lambda: None))
    assert not begun
    pool.shutdown()


async def test_too_much_queued_and_too_many_lost_threads_are_an_overload(
    release: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_pool, "MAX_JOBS", 4)
    monkeypatch.setattr(text_pool, "MAX_LOST", 2)
    pool = TextPool(timeout=0.1)
    tasks = [asyncio.create_task(pool.run(release.wait)) for _ in range(2)]
    await until(lambda: not pool._jobs.qsize())
    tasks += [asyncio.create_task(pool.run(release.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="tokenised"):
        await pool.run(lambda: None)
    await asyncio.gather(*tasks, return_exceptions=True)
    with pytest.raises(OverloadedError, match="tokenised"):  # two threads are lost
        await pool.run(lambda: None)
    release.set()
    await until(lambda: pool._num_lost == 0)
    await pool.run(lambda: None)
    pool.shutdown()


async def test_a_pool_that_was_shut_down_keeps_no_thread_and_takes_no_work() -> None:
    pool = TextPool()
    await pool.run(lambda: None)
    threads, start = set(pool._threads), time.perf_counter()
    pool.shutdown()
    pool.shutdown()
    assert time.perf_counter() - start < 1
    assert len(threads) == 2 and not any(thread.is_alive() for thread in threads)
    with pytest.raises(EngineDeadError):
        await pool.run(lambda: None)
