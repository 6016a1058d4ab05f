"""Bytes that a running engine holds are those that were planned, within 5 %: by the engine, and by `mini-vllm plan`.

Everything that lives is counted, storage by storage, whoever holds it: a second copy of the weights, padding, a scale
too many would show. The model is large enough that the buffers of a step vanish beside its weights.
"""

import gc
import re
from pathlib import Path

import pytest
import torch

from mini_vllm.config import QuantizationOptions
from mini_vllm.engine.core import EngineCore
from mini_vllm.ops.cpu import library
from mini_vllm.quantization.packed import PackedLinearMethod
from mini_vllm.simulator.planner.hardware import hardware_preset
from mini_vllm.simulator.planner.options import PlanOptions
from mini_vllm.simulator.planner.setup import Setup
from mini_vllm.simulator.planner.source import resolve_model
from tests.checkpoints import make_checkpoint
from tests.integration.rig import Rig

pytestmark = pytest.mark.skipif(not library.available(), reason="no native kernels here")

NEAR = 0.05
NUM_BLOCKS, BUDGET = 512, 16
CASES = {
    "float32": ("float32", None, "auto"),
    "bfloat16": ("bfloat16", None, "auto"),
    "int8": ("bfloat16", "int8", "auto"),
    "weight-only": ("bfloat16", "int8_per_channel_weight_only", "auto"),
    "int4": ("bfloat16", "int4", "auto"),
    "int8 cache": ("bfloat16", "int8", "int8_per_token_head"),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("llama"), "llama", tokenizer=False, vocab_size=4100, hidden_size=384,
        intermediate_size=1100, num_layers=3, num_heads=6, num_kv_heads=2, tie_word_embeddings=request.param,
    )  # fmt: skip


def living_bytes() -> int:
    """Of all storages that a tensor refers to, each once; opaque tensors by their size."""
    sizes: dict[object, int] = {}
    gc.collect()
    for tensor in (item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)):
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        else:
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def start(folder: Path, dtype: str, method: str | None, kv_dtype: str) -> EngineCore:
    options = None if method is None else QuantizationOptions(method)
    rig = Rig(folder, dtype=dtype, quantization=options, kv_cache_dtype=kv_dtype)
    return rig.engine(num_blocks=NUM_BLOCKS, budget=BUDGET, max_num_seqs=4)


def planned(folder: Path, dtype: str, method: str | None, kv_dtype: str) -> tuple[int, int]:
    """(weights, KV cache) of a plan for a CPU."""
    options = PlanOptions(
        dtype=dtype, quantization=method, kv_cache_dtype=kv_dtype, num_gpu_blocks_override=NUM_BLOCKS, context=128
    )
    setup = Setup(resolve_model(str(folder)), hardware_preset("cpu-desktop-ddr5"), options)
    return setup.weight_bytes, setup.num_blocks * setup.block_bytes


@pytest.mark.parametrize("case", CASES)
def test_weights_and_cache_take_what_was_planned(folder: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    before = living_bytes()
    with caplog.at_level("INFO", logger="mini_vllm"):
        engine = start(folder, *CASES[case])
    taken = living_bytes() - before
    weights, cache = planned(folder, *CASES[case])
    kv_config = engine.executor.kv_cache_config()  # type: ignore[attr-defined]
    assert kv_config.num_blocks * kv_config.bytes_per_block == cache
    assert logged_mib(caplog.text, "Model loading took") * 2**20 == pytest.approx(weights, rel=NEAR)
    assert logged_mib(caplog.text, "KV cache:") * 2**20 == pytest.approx(cache, rel=0.001)
    assert taken == pytest.approx(weights + cache, rel=NEAR)
    engine.shutdown()


def logged_mib(text: str, what: str) -> float:
    found = re.search(rf"{what} ([\d.]+) MiB", text)
    assert found is not None
    return float(found[1])


def test_control_plain_weights_that_stay_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    finish = PackedLinearMethod.process_weights_after_loading

    def keep(self: PackedLinearMethod, layer: torch.nn.Module) -> None:
        kept.append(layer.weight.clone())  # type: ignore[operator]
        finish(self, layer)

    monkeypatch.setattr(PackedLinearMethod, "process_weights_after_loading", keep)
    before = living_bytes()
    engine = start(folder, *CASES["int8"])
    assert living_bytes() - before > (1 + NEAR) * sum(planned(folder, *CASES["int8"]))
    engine.shutdown()
