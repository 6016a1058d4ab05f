"""A replayed step gives the logits of an eager one, to the last bit, in every family, format and shape of step."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mini_vllm.config import QuantizationOptions
from mini_vllm.layers.activation import SiluAndMul
from mini_vllm.models.registry import ModelRegistry
from mini_vllm.ops.cpu import library
from mini_vllm.ops.cpu.recording import NativeStretch
from mini_vllm.worker import captured_step
from mini_vllm.worker.model_runner import ModelRunner
from tests.families import BY_NAME, FAMILIES, VOCAB_SIZE
from tests.worker.harness import Hand, make_runner

pytestmark = pytest.mark.skipif(not library.available(), reason="no native kernels here")

LLAMA = next(family.name for family in FAMILIES if family.architecture == "LlamaForCausalLM")


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


def serve(runner: ModelRunner) -> dict[str, list[torch.Tensor]]:
    """Whole prompts, chunks beside decodes, steps in which nothing samples, an abort; the logits of every sample."""
    hand = Hand(runner)
    hand.step({hand.add("a", prompt(1, 9)): 9, hand.add("b", prompt(2, 23)): 7}, ["a", "b"])
    hand.step({"b": 5})
    hand.step({"b": 11, "a": 1, hand.add("c", prompt(3, 4)): 4}, ["c"])
    for _ in range(3):
        hand.step({"a": 1, "b": 1, "c": 1})
    hand.step({"a": 1, "c": 1}, finished=["b"])
    return hand.logits


def assert_same(actual: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]]) -> None:
    assert actual.keys() == expected.keys()
    for req_id, rows in expected.items():
        assert len(rows) == len(actual[req_id])
        assert all(torch.equal(row, other) for row, other in zip(rows, actual[req_id], strict=True)), req_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return BY_NAME[LLAMA].write(tmp_path)


def both(folder: Path, **kwargs: object) -> tuple[ModelRunner, ModelRunner]:
    """The same model, (captured, eager)."""
    captured, eager = (make_runner(folder, enforce_eager=off, **kwargs) for off in (False, True))  # type: ignore[arg-type]
    assert eager.captured is None
    return captured, eager


MOSTLY_TORCH = ("llama4-dense", "stablelm-2-12b")
"""Their heads are prepared by torch's operators in every layer, so that recording them does not pay."""


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_every_family_is_replayed_bit_for_bit(name: str, tmp_path: Path) -> None:
    captured, eager = both(BY_NAME[name].write(tmp_path))
    assert (captured.captured is None) == (name in MOSTLY_TORCH)
    assert_same(serve(captured), serve(eager))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["int8", "int4", "int8_per_channel_weight_only"])
def test_every_format_is_replayed_bit_for_bit(folder: Path, dtype: str, method: str) -> None:
    captured, eager = both(folder, dtype=dtype, quantization=QuantizationOptions(method))
    assert_same(serve(captured), serve(eager))


def test_bfloat16_is_replayed_bit_for_bit(folder: Path) -> None:
    captured, eager = both(folder, dtype="bfloat16")
    assert_same(serve(captured), serve(eager))


def programs(runner: ModelRunner) -> Sequence[captured_step.Program]:
    step = runner.captured
    assert step is not None and step._forward is not None and step._logits is not None
    return step._forward, step._logits


def test_a_llama_is_two_native_calls_and_its_python_does_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(folder, quantization=QuantizationOptions("int8"))
    assert [[type(piece) for piece in program.pieces] for program in programs(runner)] == [[NativeStretch]] * 2
    monkeypatch.setattr(runner.model, "forward", lambda *args: pytest.fail("ran"))
    monkeypatch.setattr(runner.model, "compute_logits", lambda *args: pytest.fail("ran"))
    serve(runner)


def test_steady_decoding_allocates_no_tensor(folder: Path) -> None:
    runner = make_runner(folder, quantization=QuantizationOptions("int8"))
    forward, logits = programs(runner)
    hand = Hand(runner)
    hand.generate([hand.add("a", prompt(1, 9)), hand.add("b", prompt(2, 12))], 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        forward.run(2)
        logits.run(2)
    assert sum(event.cpu_memory_usage for event in profile.key_averages()) == 0


def test_ids_beyond_the_tokenizer_stay_masked_step_after_step(folder: Path) -> None:
    captured, eager = both(folder, quantization=QuantizationOptions("int8"), tokenizer_vocab_size=40)
    logits = serve(captured)
    assert all(row[40:].eq(-torch.inf).all() and row[:40].isfinite().all() for rows in logits.values() for row in rows)
    assert_same(logits, serve(eager))


def test_control_a_call_of_the_wrong_layer_shows(folder: Path) -> None:
    captured, eager = both(folder, quantization=QuantizationOptions("int8"))
    stretch = programs(captured)[0].pieces[0]
    assert isinstance(stretch, NativeStretch)
    norms = [i for i, name in enumerate(stretch.names) if name == "mv_rms_norm"]
    stretch._calls[norms[1]].args = stretch._calls[norms[0]].args
    with pytest.raises(AssertionError):
        assert_same(serve(captured), serve(eager))


def plain_silu_and_mul(self: SiluAndMul, x: torch.Tensor) -> torch.Tensor:
    """A layer that somebody wrote in plain torch."""
    gate, value = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * value


def test_layers_in_plain_torch_are_pieces_between_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiluAndMul, "forward", plain_silu_and_mul)
    captured, eager = both(folder, quantization=QuantizationOptions("int8"))
    forward = programs(captured)[0]
    assert forward.recording.num_breaks == 2 * 2
    assert_same(serve(captured), serve(eager))


def test_a_model_that_looks_at_its_numbers_stays_eager(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(captured_step.logger, "info", lambda message, *args: said.append(message % args))
    llama = ModelRegistry.resolve(["LlamaForCausalLM"])
    forward = llama.forward

    def curious(self, input_ids, positions, *args):  # type: ignore[no-untyped-def]
        hidden = forward(self, input_ids, positions, *args)
        if hidden.isnan().any():
            hidden = hidden.nan_to_num()
        return hidden

    monkeypatch.setattr(llama, "forward", curious)
    captured, eager = both(folder)
    assert captured.captured is None and said[0].startswith("Captured step: no forward, since")
    assert_same(serve(captured), serve(eager))
