"""benchmarks/cpu: the GGUF files for llama.cpp hold the checkpoint, as the package's own reader sees it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.cpu import gguf_file
from benchmarks.cpu.shapes import SHAPES, make_checkpoint
from mini_vllm.gguf.reader import open_gguf
from mini_vllm.gguf.weights import checkpoint_tensors

pytest.importorskip("gguf")

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 320,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
Weights = dict[str, npt.NDArray[np.float32]]


@pytest.fixture(params=["llama", "qwen2"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shape = {"llama": "llama-1.1b", "qwen2": "qwen2.5-0.5b"}[request.param]
    monkeypatch.setitem(SHAPES, "small", SHAPES[shape] | SMALL)
    return make_checkpoint("small", tmp_path)


def convert(folder: Path, width: str) -> Weights:
    file = folder.parent / f"{width}.gguf"
    gguf_file.write_gguf(folder, file, width)
    return {t.name: t.read(0, t.shape[0]).reshape(t.shape) for t in checkpoint_tensors(open_gguf(file))}


def largest_error(folder: Path, found: Weights) -> float:
    """Over all tensors, relative to the largest weight of each."""
    expected = gguf_file.read_tensors(folder)
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[n] - expected[n]).max() / np.abs(expected[n]).max()) for n in expected)


@pytest.mark.parametrize(("width", "error"), [("f32", 0.0), ("bf16", 0.0), ("q8_0", 0.005), ("q4_0", 0.13)])
def test_a_gguf_file_holds_the_weights_of_the_checkpoint(checkpoint: Path, width: str, error: float) -> None:
    assert largest_error(checkpoint, convert(checkpoint, width)) <= error


def test_queries_and_keys_in_the_wrong_order_would_be_seen(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken control of the test above, for the family whose rows llama.cpp reorders."""
    if "Llama" not in (checkpoint / "config.json").read_text():
        pytest.skip("qwen2 keeps its order")
    monkeypatch.setattr(gguf_file, "interleaved", lambda matrix, heads: matrix)
    assert largest_error(checkpoint, convert(checkpoint, "f32")) > 0.5


def test_the_head_of_a_4_bit_file_has_8_bits(checkpoint: Path) -> None:
    file = checkpoint.parent / "head.gguf"
    gguf_file.write_gguf(checkpoint, file, "q4_0")
    types = {name: tensor.kind.name for name, tensor in open_gguf(file).tensors.items()}
    head = "output.weight" if "output.weight" in types else "token_embd.weight"
    assert types[head] == "Q8_0" and types["blk.0.ffn_up.weight"] == "Q4_0" and types["output_norm.weight"] == "F32"


def test_a_tensor_that_no_llama_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vision: no tensor of a Llama or Qwen2"):
        gguf_file.gguf_name("model.vision")
