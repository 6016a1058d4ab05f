"""`--batch-invariant`: a request's logits are the same bits alone, among neighbours, cut up, cached and preempted.

The first part compares logits bit for bit in every number format; the second runs the master invariant's cases in
bfloat16, where tokens are exactly equal for no other reason. A linear layer whose sums depend on the number of rows is
the broken control.
"""

from typing import Any

import pytest
import torch
from hypothesis import settings

from mini_vllm.config import QuantizationOptions
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.core import EngineCore
from mini_vllm.exceptions import ConfigError
from mini_vllm.layers.activation import get_act, get_act_and_mul
from mini_vllm.ops import batch_invariance
from mini_vllm.ops.batch_invariance import batch_invariance as within_batch_invariance
from mini_vllm.ops.cpu import linear as kernels
from mini_vllm.quantization.packed import PackedLinearMethod
from mini_vllm.quantization.unquantized import UnquantizedLinearMethod
from tests.checkpoints import make_checkpoint
from tests.integration import test_master_invariant as master
from tests.integration.rig import VOCAB_SIZE, Rig, run
from tests.integration.test_master_invariant import (  # noqa: F401  the same tests with the fixtures of this module
    JOBS,
    alone,
    test_a_cold_and_a_warm_prefix_cache_give_the_same_tokens,
    test_a_pool_that_forces_preemptions_gives_the_same_tokens,
    test_a_prefix_cache_that_evicts_all_the_time_gives_the_same_tokens,
    test_an_abort_of_neighbours_gives_the_same_tokens,
    test_any_block_size_gives_the_same_tokens,
    test_any_neighbours_give_the_same_tokens,
    test_any_order_of_arrival_gives_the_same_tokens,
    test_any_physical_placement_gives_the_same_tokens,
    test_any_prefill_threshold_gives_the_same_tokens,
    test_any_token_budget_gives_the_same_tokens,
    tight_pool,
)

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no native kernels on this machine")

FORMATS: dict[str, tuple[str, QuantizationOptions | None, str]] = {
    "float32": ("float32", None, "auto"),
    "bfloat16": ("bfloat16", None, "auto"),
    "float16": ("float16", None, "auto"),
    "int8": ("bfloat16", QuantizationOptions("int8"), "auto"),
    "int8-group": ("bfloat16", QuantizationOptions("int8", group_size=32, activation_scales="group"), "auto"),
    "int8-weight-only": ("bfloat16", QuantizationOptions("int8_per_channel_weight_only"), "auto"),
    "int4": ("bfloat16", QuantizationOptions("int4"), "auto"),
    "int4-asymmetric": ("bfloat16", QuantizationOptions("int4", symmetric=False, lm_head="same"), "auto"),
    "int8-cache": ("bfloat16", None, "int8_per_token_head"),
    "int8-cache-and-weights": ("bfloat16", QuantizationOptions("int8"), "int8_per_token_head"),
}
"""(dtype, weights, KV cache)"""
Logits = list[list[torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, load_once: None) -> Any:
    path = tmp_path_factory.mktemp("llama")
    return make_checkpoint(path, "llama", seed=3, tokenizer=False, vocab_size=VOCAB_SIZE, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def rig(folder: Any) -> Rig:
    """What the master invariant's tests get here: bfloat16, batch-invariant."""
    return Rig(folder, dtype="bfloat16", batch_invariant=True)


@pytest.fixture(scope="module")
def reference(rig: Rig) -> list[list[int]]:
    return alone(rig)


def logits_of(engine: EngineCore, jobs: Any = JOBS, **how: Any) -> tuple[Logits, Any]:
    """(for each job the logits its tokens were sampled from, what `run` gave)."""
    stage = engine.executor.runner.sampling  # type: ignore[attr-defined]
    seen: Logits = [[] for _ in jobs]
    sample = stage.sample

    def record(inputs: Any, logits: torch.Tensor, *rest: Any) -> Any:
        for req_id, row in zip(stage._draws(inputs, {}).req_ids, logits.clone(), strict=True):
            seen[int(req_id)].append(row)
        return sample(inputs, logits, *rest)

    stage.sample = record
    outcome = run(engine, jobs, **how)
    stage.sample = sample
    return seen, outcome


def same_bits(found: Logits, wanted: Logits) -> bool:
    return all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(found, wanted, strict=True)
    )


def logits_alone(rig: Rig) -> Logits:
    return [logits_of(rig.engine(caching=False), [job])[0][0] for job in JOBS]


def rig_of(folder: Any, name: str, **more: Any) -> Rig:
    dtype, quantization, kv_dtype = FORMATS[name]
    return Rig(
        folder, dtype=dtype, batch_invariant=True, quantization=quantization, kv_cache_dtype=kv_dtype, **more
    )  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_the_same_bits_whatever_happens_around_a_request(folder: Any, name: str) -> None:
    rig = rig_of(folder, name)
    wanted = logits_alone(rig)
    assert same_bits(logits_of(rig.engine())[0], wanted), "among neighbours"
    assert same_bits(logits_of(rig.engine(budget=17, caching=False))[0], wanted), "chunked"
    engine = rig.engine(block_size=8, num_blocks=400)
    logits_of(engine)
    warm, outcome = logits_of(engine)
    assert sum(outcome.cached_tokens) > 0
    assert same_bits(warm, wanted), "with prefix hits"
    tight, outcome = logits_of(rig.engine(block_size=8, num_blocks=tight_pool(8), budget=40), arrive_every=1)
    assert outcome.num_preemptions > 0
    assert same_bits(tight, wanted), "after preemption"


@pytest.mark.parametrize("name", FORMATS)
def test_any_combination_gives_the_same_tokens_in_every_format(folder: Any, name: str) -> None:
    """The master invariant's random shapes, a few of each; `HYPOTHESIS_PROFILE=wide` has no say here."""
    rig = rig_of(folder, name)
    expected = alone(rig)

    @settings(max_examples=3, derandomize=True, database=None)
    @master.COMBINATION
    def check(**case: Any) -> None:
        master.check_combination(rig, expected, **case)

    check()


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int8-cache"])
def test_steps_planned_ahead_and_eager_steps_give_the_same_tokens(folder: Any, name: str) -> None:
    expected = alone(rig_of(folder, name))
    ahead = rig_of(folder, name, async_scheduling=True)
    assert run(ahead.engine(budget=24, block_size=8), JOBS, arrive_every=2).tokens == expected
    assert run(rig_of(folder, name).engine(budget=24, block_size=8, enforce_eager=True), JOBS).tokens == expected


@pytest.mark.parametrize("method", [UnquantizedLinearMethod, PackedLinearMethod])
def test_the_comparison_notices_a_layer_whose_rows_depend_on_their_number(
    folder: Any, method: type[UnquantizedLinearMethod], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken control: with an even number of rows, the last bit of every number is another."""
    quantization = QuantizationOptions("int8") if method is PackedLinearMethod else None
    rig = Rig(folder, dtype="float32", batch_invariant=True, quantization=quantization)
    wanted = logits_alone(rig)
    apply = method.apply

    def uneven(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = apply(self, layer, x, bias)
        return output if len(x) % 2 else torch.nextafter(output, torch.tensor(torch.inf))

    monkeypatch.setattr(method, "apply", uneven)
    assert not same_bits(logits_of(rig.engine())[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_new", "relu", "gated silu", "gated gelu", "gated gelu_new"])
def test_activations_do_not_depend_on_the_shape_of_the_batch(name: str, dtype: torch.dtype) -> None:
    """torch's SiLU and tanh-GELU do: at the ends of its parts single numbers are rounded otherwise than vectors."""
    with within_batch_invariance(True):
        act = get_act_and_mul(name.removeprefix("gated ")) if name.startswith("gated") else get_act(name)
    for width in (18, 64, 100):
        x = torch.randn(257, width, generator=torch.Generator().manual_seed(width)).to(dtype) * 3
        whole = act(x)
        for first, last in ((0, 1), (3, 10), (100, 257), (256, 257)):
            assert torch.equal(act(x[first:last].clone()), whole[first:last])


def test_it_is_refused_where_it_cannot_be_had(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match="batch_invariant: attention must be CPU_NATIVE's, and here it is TORCH_REF's"
    ):
        Rig(folder, batch_invariant=True, attention_backend="TORCH_REF").engine()
    monkeypatch.setattr(batch_invariance.library, "available", lambda: False)
    with pytest.raises(ConfigError, match="batch_invariant: needs the native kernels"), within_batch_invariance(True):
        pass


def test_the_argument_and_vllms_variable_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not EngineArgs().create_engine_config().model.batch_invariant
    assert EngineArgs(batch_invariant=True).create_engine_config().model.batch_invariant
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert EngineArgs().create_engine_config().model.batch_invariant
