"""Caches that are not stored in the model's dtype: no way of serving changes a token, a block takes what was planned,
and forks copy scales too. int8 values and their scale depend on one token and head alone, so tokens are
exactly equal under float32 weights."""

from pathlib import Path

import pytest
import torch

from mini_vllm import LLM, SamplingParams
from mini_vllm.attention import native, torch_ref
from mini_vllm.exceptions import ConfigError
from mini_vllm.layers.attention import Attention
from mini_vllm.ops.cpu import library
from mini_vllm.simulator.planner import geometry
from tests.checkpoints import make_checkpoint
from tests.integration.rig import VOCAB_SIZE, Rig, mixed_jobs, run
from tests.integration.test_master_invariant import tight_pool

JOBS = mixed_jobs()
BACKENDS = [
    pytest.param("CPU_NATIVE", marks=pytest.mark.skipif(not library.available(), reason="no kernels")),
    "TORCH_REF",
]
DTYPES = ["int8_per_token_head", "float16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, load_once: None) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", seed=3, tokenizer=False, vocab_size=VOCAB_SIZE)


def alone(rig: Rig) -> list[list[int]]:
    return [run(rig.engine(caching=False), [job]).tokens[0] for job in JOBS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_neighbours_hits_and_preemptions_change_no_token(folder: Path, backend: str, dtype: str) -> None:
    rig = Rig(folder, attention_backend=backend, kv_cache_dtype=dtype)
    expected = alone(rig)
    engine = rig.engine(block_size=8, num_blocks=tight_pool(8), budget=40, threshold=16, shuffle=1)
    outcome = run(engine, JOBS, arrive_every=2)
    assert outcome.num_preemptions > 0
    assert outcome.tokens == expected
    warm = run(engine, JOBS)
    assert warm.tokens == expected
    assert any(warm.cached_tokens)


def test_int8_differs_from_the_plain_cache_so_it_was_really_used(folder: Path) -> None:
    assert alone(Rig(folder, kv_cache_dtype="int8_per_token_head")) != alone(Rig(folder))


@pytest.mark.skipif(not library.available(), reason="no kernels")
def test_control_a_scale_of_the_whole_block_would_change_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a token is stored as must not depend on those written beside it."""

    def of_all(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.float().abs().max() / 127
        return (x / scale).round().to(torch.int8), scale.expand(x.shape[:-1])

    rig = Rig(folder, attention_backend="TORCH_REF", kv_cache_dtype="int8_per_token_head")
    monkeypatch.setattr(torch_ref, "quantize", of_all)
    expected = alone(rig)
    assert run(rig.engine(budget=24, threshold=7), JOBS).tokens != expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8_per_token_head"])
def test_a_block_takes_the_bytes_that_are_planned(folder: Path, dtype: str) -> None:
    engine = Rig(folder, kv_cache_dtype=dtype).engine(num_blocks=10)
    runner = engine.executor.runner  # type: ignore[attr-defined]
    layer = next(iter(runner.layers.values()))
    stored = sum(cache.numel() * cache.element_size() for cache in runner.kv_caches.values())
    assert stored == 10 * engine.executor.kv_cache_config().bytes_per_block  # type: ignore[attr-defined]
    kinds = (geometry.KVLayers("full", len(runner.layers), 2 * layer.num_kv_heads * layer.head_size),)
    shape = dict.fromkeys("num_layers hidden_size intermediate_size vocab_size max_model_len".split(), 1)
    model = geometry.ModelGeometry(
        name="m", num_heads=layer.num_heads, num_kv_heads=layer.num_kv_heads, head_dim=layer.head_size, kv_layers=kinds,
        parameters=geometry.Parameters(), linears=(), **shape,
    )  # fmt: skip
    assert stored == 10 * 16 * model.kv_bytes_per_token(dtype)


def test_samples_that_part_in_a_shared_block_are_those_of_the_plain_way() -> None:
    """Forks copy blocks, scales and all."""
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=8)
    prompts = ["def main():\n    return", "import"]
    texts = []
    for caching in (True, False):
        llm = LLM(kv_cache_dtype="int8", dtype="float32", enable_prefix_caching=caching, disable_log_stats=True,
                  kv_cache_memory_bytes=8 << 20)  # fmt: skip
        outputs = llm.generate(prompts, params, use_tqdm=False)
        texts.append([[sample.token_ids for sample in output.outputs] for output in outputs])
    assert texts[0] == texts[1]
    assert len({tuple(ids) for ids in texts[0][0]}) > 1


def test_a_backend_without_such_a_cache_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (native.NativeBackend, torch_ref.TorchRefBackend):
        monkeypatch.setattr(backend, "supported_kv_cache_dtypes", ("float32",))
    with pytest.raises(ConfigError, match="kv_cache_dtype: attention backend .* stores float32, not 'int8_per_token"):
        Attention(4, 64, 1.0, 2, prefix="x").get_kv_cache_spec(16, "int8_per_token_head")
    with pytest.raises(ConfigError, match="kv_cache_dtype: must be one of auto, .*int8, got 'fp8'"):
        LLM(kv_cache_dtype="fp8")


def test_a_head_size_that_would_misalign_scales_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 4, not 6"):
        Attention(4, 6, 1.0, 2, prefix="x").get_kv_cache_spec(16, "int8_per_token_head")
