"""Claims about an engine process that dies, hangs, does not start, or loses its parent: real processes and signals."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from mini_vllm.engine.async_llm import AsyncLLM
from mini_vllm.engine.core import EngineCore
from mini_vllm.engine.process.async_core_client import ThreadCoreClient
from mini_vllm.engine.process.engine_process import private_folder
from mini_vllm.engine.process.mp_client import ProcessCoreClient
from mini_vllm.exceptions import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    KVCacheTooSmallError,
    OverloadedError,
    RequestError,
    UnsupportedModelError,
)
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams
from tests.async_rig import async_engine, engine_args, finish, in_process_engine, new_requests
from tests.checkpoints import make_checkpoint

LONG = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
SHORT = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)


def pid_of(engine: AsyncLLM) -> int:
    assert isinstance(engine.client, ProcessCoreClient)
    return engine.client.pid


async def outcomes(engine: AsyncLLM, num: int) -> Sequence[object]:
    """Tasks that each stream a long answer, of which the first output is there."""
    streams = await engine.add_requests(await new_requests(engine, [f"prompt {i}" for i in range(num)], LONG))
    for stream in streams:
        await anext(stream)

    async def read(stream: object) -> None:
        async for _ in stream:  # type: ignore[attr-defined]
            pass

    return [asyncio.create_task(read(stream)) for stream in streams]


async def test_every_stream_hears_at_once_that_the_engine_was_killed() -> None:
    async with async_engine() as engine:
        readers = await outcomes(engine, 4)
        start = time.monotonic()
        os.kill(pid_of(engine), signal.SIGKILL)
        results = await asyncio.gather(*readers, return_exceptions=True)  # type: ignore[call-overload]
        assert time.monotonic() - start < 2.0
        assert [type(result) for result in results] == [EngineDeadError] * 4 and "signal 9" in str(results[0])
        await engine.wait_dead()
        assert not engine.is_running and not engine.num_unfinished_requests
        assert not engine.output_processor.unfinished_request_ids()
        for call in (engine.check_health, engine.stats, lambda: finish(engine, "a", SHORT)):
            with pytest.raises(EngineDeadError, match="signal 9"):
                await call()  # type: ignore[operator]


async def test_an_engine_that_hangs_is_killed_and_reported() -> None:
    async with async_engine(watchdog_timeout=1.0) as engine:
        await asyncio.sleep(1.5)  # idle is not hung
        await engine.check_health()
        os.kill(pid_of(engine), signal.SIGSTOP)
        stream = (await engine.add_requests(await new_requests(engine, ["a"], SHORT)))[0]
        with pytest.raises(EngineDeadError, match="hung"):
            await asyncio.wait_for(anext(stream), 10)


async def test_a_killed_engine_is_started_again_and_serves() -> None:
    async with async_engine(restart=True) as engine:
        before = await finish(engine, "hello", SHORT)
        readers = await outcomes(engine, 2)
        os.kill(pid_of(engine), signal.SIGKILL)
        results = await asyncio.gather(*readers, return_exceptions=True)  # type: ignore[call-overload]
        assert all(isinstance(result, EngineDeadError) for result in results)
        with pytest.raises(OverloadedError) as caught:
            await finish(engine, "hello", SHORT)
        assert caught.value.reason == "engine_restarting" and caught.value.retry_after >= 1
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        while not engine.is_running:
            await asyncio.sleep(0.01)
        after = await finish(engine, "hello", SHORT)
        assert after.outputs == before.outputs and engine.dead_error is None


@pytest.mark.slow
async def test_an_engine_that_dies_again_and_again_is_given_up() -> None:
    async with async_engine(restart=True) as engine:
        for _ in range(3):
            while not engine.is_running:
                await asyncio.sleep(0.01)
            os.kill(pid_of(engine), signal.SIGKILL)
            while engine.is_running:
                await asyncio.sleep(0.01)
        await asyncio.wait_for(engine.wait_dead(), 10)
        assert engine.dead_error is not None


async def test_a_bug_in_the_loop_of_the_core_ends_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    async with in_process_engine() as engine:
        assert isinstance(engine.client, ThreadCoreClient)
        streams = await engine.add_requests(await new_requests(engine, ["a", "b"], LONG))

        def broken(core: EngineCore) -> None:
            core.abort_requests(["0", "1"])
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(EngineCore, "step", broken)
        for stream in streams:
            with pytest.raises(EngineDeadError, match="ZeroDivisionError: a bug"):
                async for _ in stream:
                    pass


@pytest.mark.slow
async def test_the_last_words_of_an_engine_that_dies_of_a_bug_are_told() -> None:
    async with async_engine() as engine:
        assert isinstance(engine.client, ProcessCoreClient)
        engine.client._process._outbox.send(b"\x91\x63")  # a message of a kind that there is not
        await asyncio.wait_for(engine.wait_dead(), 10)
        assert "exited with status 1: ValidationError" in str(engine.dead_error)


@pytest.mark.slow
async def test_sigterm_lets_the_engine_finish_what_it_has_and_an_interrupt_is_not_its_business() -> None:
    async with async_engine() as engine:
        os.kill(pid_of(engine), signal.SIGINT)
        (stream,) = await engine.add_requests(await new_requests(engine, ["a"], LONG))
        await anext(stream)
        os.kill(pid_of(engine), signal.SIGTERM)
        assert [output async for output in stream][-1].outputs[0].finish_reason == "length"
        await asyncio.wait_for(engine.wait_dead(), 10)
        assert "status 0" in str(engine.dead_error)


# -- starting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"num_gpu_blocks_override": 4}, KVCacheTooSmallError, "max_model_len"),
        ({"model": "/no/such/folder"}, CheckpointError, "/no/such/folder"),
        pytest.param({"attention_backend": "NOPE"}, ConfigError, "NOPE", marks=pytest.mark.slow),
        pytest.param({"logits_processors": "no.such:Thing"}, ConfigError, "no.such", marks=pytest.mark.slow),
    ],
    ids=["pool", "folder", "backend", "processors"],
)
async def test_what_keeps_an_engine_from_starting_keeps_its_type(
    options: dict[str, object], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        await AsyncLLM.from_engine_args(engine_args(**options))


@pytest.mark.slow
async def test_an_unsupported_model_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", config_overrides={"architectures": ["MambaForCausalLM"]})
    with pytest.raises(UnsupportedModelError, match="Mamba"):
        await AsyncLLM.from_engine_args(engine_args(model=str(folder)))


async def test_a_start_that_is_cancelled_leaves_no_process() -> None:
    starting = asyncio.create_task(AsyncLLM.from_engine_args(engine_args()))
    while not psutil.Process().children():
        await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not psutil.Process().children()


# -- ending ----------------------------------------------------------------------------------------------------


async def test_nothing_is_left_after_a_shutdown(short_folder: Path) -> None:
    await run_and_shut_down(in_process=True)  # loads what stays
    before = resources(short_folder)
    await run_and_shut_down(in_process=True)
    await run_and_shut_down(in_process=False)
    await asyncio.sleep(0)
    assert resources(short_folder) == before


async def run_and_shut_down(in_process: bool) -> None:
    engine = await AsyncLLM.from_engine_args(engine_args(), in_process=in_process)
    if isinstance(engine.client, ProcessCoreClient):
        folder = Path(engine.client._process._folder)
        assert folder.stat().st_mode & 0o777 == 0o700
    (stream,) = await engine.add_requests(await new_requests(engine, ["a"], LONG))
    await anext(stream)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        async for _ in stream:
            pass
    with pytest.raises(EngineDeadError, match="shut down"):
        await finish(engine, "a", SHORT)


@pytest.fixture
def short_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders go, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def resources(folder: Path) -> tuple[int, list[str], list[Path], int]:
    """Open files, threads, what is in the folder, child processes."""
    me = psutil.Process()
    threads = sorted(thread.name for thread in threading.enumerate() if "mini_vllm" in thread.name)
    return me.num_fds(), threads, list(folder.iterdir()), len(me.children())


def test_a_temporary_folder_too_deep_for_sockets_is_not_used(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = short_folder / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = Path(private_folder())
    assert folder.parent == Path("/tmp") and not list(deep.iterdir())
    folder.rmdir()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_engine_never_outlives_its_parent_which_needs_no_torch() -> None:
    code = textwrap.dedent("""
        import asyncio, sys, time
        sys.modules["torch"] = None
        from mini_vllm.engine.arg_utils import EngineArgs
        from mini_vllm.engine.async_llm import AsyncLLM
        from mini_vllm.sampling_params import SamplingParams
        async def main():
            args = EngineArgs(dtype="float32", num_threads=1, num_gpu_blocks_override=80)
            engine = await AsyncLLM.from_engine_args(args)
            async for output in engine.generate("import os", SamplingParams(max_tokens=2), "r"):
                pass
            assert output.finished
            print(engine.client.pid, flush=True)
            time.sleep(60)
        asyncio.run(main())
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        assert "core_proc" in " ".join(engine.cmdline()) and engine.name() == "mini_vllm::Core"
        parent.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        engine.wait(10)
    assert not engine.is_running()


# -- news that cannot be processed ---------------------------------------------------------------------------


def fail_once(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call of `owner.name` raises; those after it work again."""
    right = getattr(owner, name)

    def wrong(*args: object) -> None:
        monkeypatch.setattr(owner, name, right)
        raise ZeroDivisionError(name)

    monkeypatch.setattr(owner, name, wrong)


@pytest.mark.parametrize("name", ["process", "take_stopped", "receive", "_deliver"])
async def test_news_that_is_lost_ends_its_requests_and_the_engine_serves_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with in_process_engine() as engine:
        readers = await outcomes(engine, 2)
        owner = {"receive": engine.client, "_deliver": engine._unfinished}.get(name, engine.output_processor)
        fail_once(owner, name, monkeypatch)
        results = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), 10)  # type: ignore[call-overload]
        assert [type(result) for result in results] == [RequestError] * 2 and name in str(results[0])
        assert (await finish(engine, "hello", SHORT)).outputs[0].finish_reason == "length"
        stats = await engine.stats()
        assert (stats.num_running_reqs, stats.num_waiting_reqs, engine.num_unfinished_requests) == (0, 0, 0)
        assert not engine.output_processor.unfinished_request_ids() and not engine._unfinished.leaving


async def test_a_last_output_that_is_lost_ends_its_stream_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor has forgotten the request by then."""
    async with in_process_engine() as engine:
        good, bad = await new_requests(engine, ["good", "bad"], SHORT)
        fail_once(engine._unfinished, "_deliver", monkeypatch)
        streams = await engine.add_requests([good, bad])
        results = await asyncio.wait_for(asyncio.gather(*map(anext, streams), return_exceptions=True), 10)
        assert [type(result) for result in results] == [RequestError] * 2
        assert not engine.num_unfinished_requests


async def test_an_abort_that_cannot_be_told_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    async with in_process_engine() as engine:
        (reader,) = await outcomes(engine, 1)
        fail_once(engine.output_processor, "abort", monkeypatch)
        await engine.abort("0")
        with pytest.raises(RequestError, match="could not be processed"):
            await asyncio.wait_for(reader, 10)  # type: ignore[arg-type]
        assert (await finish(engine, "hello", SHORT)).finished
