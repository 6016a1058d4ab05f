"""Every row of tests/families.py against transformers in float32: teacher-forced logits, and the engine's tokens.

The prompts reach past every window and every original context of the rows. That the comparison would fail if a
feature were missing is shown family by family in the files beside this one.
"""

import pytest
import torch

from mini_vllm.layers.attention import get_attention_layers
from mini_vllm.layers.embedding import LearnedPositionEmbedding
from mini_vllm.layers.linear import LinearBase
from mini_vllm.layers.norm import LayerNorm
from mini_vllm.layers.rotary import RotaryEmbedding
from mini_vllm.models.registry import _MODELS
from tests.families import BY_NAME, FAMILIES, FEATURES, VOCAB_SIZE
from tests.integration.rig import Job, Rig, greedy, run
from tests.models.oracle import NUM_GREEDY, TOLERANCE, Oracle

every_family = pytest.mark.parametrize("name", list(BY_NAME))
CHUNKS = [range(9), range(9, 10), range(10, 17), range(17, 18), range(18, 49), range(49, 60), range(60, 127)]


@every_family
def test_logits_of_a_mixed_flat_batch_equal_transformers(oracle_of, name):
    oracle = oracle_of(name)
    assert oracle.error(oracle.model()) < TOLERANCE


@every_family
def test_logits_computed_in_chunks_among_decodes_equal_transformers(oracle_of, name):
    oracle = oracle_of(name)
    assert oracle.error(oracle.model(), CHUNKS) < TOLERANCE


@every_family
def test_greedy_tokens_of_the_engine_equal_transformers(oracle_of, name):
    """Alone, batched, and batched in chunks of a small budget; up to near-ties of the highest logits."""
    oracle: Oracle = oracle_of(name)
    prompts = [prompt for prompt in oracle.prompts if len(prompt) + NUM_GREEDY <= oracle.family.max_model_len]
    expected = oracle.their_greedy(prompts)
    assert len({tuple(tokens) for tokens in expected}) == len(prompts) == 4
    rig = Rig(oracle.folder, max_model_len=oracle.family.max_model_len)
    jobs = [Job(tuple(prompt), greedy(NUM_GREEDY)) for prompt in prompts]
    outcomes = [run(rig.engine(), jobs[:1]), run(rig.engine(), jobs), run(rig.engine(budget=19, block_size=8), jobs)]
    for outcome in outcomes:
        triples = zip(prompts, outcome.tokens, expected, strict=False)
        assert not any(oracle.differ(*triple) for triple in triples)
    broken = [[*expected[0][:5], (expected[0][5] + 1) % VOCAB_SIZE, *expected[0][6:]], expected[0][:-1]]
    assert all(oracle.differ(prompts[0], tokens, expected[0]) for tokens in broken), "broken control"


@every_family
def test_a_bfloat16_model_is_near_the_float32_one(oracle_of, name):
    oracle = oracle_of(name)
    spread = float(torch.cat(oracle.logits).std())
    assert oracle.mean_error(oracle.model(dtype="bfloat16"), CHUNKS) < 0.1 * spread


# --- the list itself ------------------------------------------------------------------------------------------


def features_of(model: torch.nn.Module) -> set[str]:
    """What a row would have to say of this model, read off its modules."""
    rotary = [module for module in model.modules() if isinstance(module, RotaryEmbedding)]
    attention = list(get_attention_layers(model).values())
    norms = [name for name, _ in model.named_parameters() if ".self_attn." in name and "norm" in name]
    weightless = [module for module in model.modules() if getattr(module, "qk_norm", False)]
    found = {
        "tied": model.config.tie_word_embeddings,
        "bias": any(module.bias is not None for module in model.modules() if isinstance(module, LinearBase)),
        "window": any(layer.sliding_window is not None for layer in attention),
        "qk-norm": bool(norms or weightless),
        "partial rotary": any(module.rotary_dim < attention[0].head_size for module in rotary),
        "fused tensors": not model.packed_modules_mapping,
        "layer norm": any(isinstance(module, LayerNorm) for module in model.modules()),
        "no-rope layers": any(not getattr(module, "rotates", True) for module in model.modules()),
        "soft caps": any(layer.impl.logit_softcap for layer in attention) or bool(model.logits_processor.soft_cap),
        "learned positions": any(isinstance(module, LearnedPositionEmbedding) for module in model.modules()),
    }
    assert set(found) == set(FEATURES)
    return {feature for feature, present in found.items() if present}


@every_family
def test_a_row_says_what_its_model_has_and_the_prompts_reach_it(oracle_of, name):
    oracle = oracle_of(name)
    model, longest = oracle.model(), max(map(len, oracle.prompts))
    assert features_of(model) == set(oracle.family.features)
    windows = [layer.sliding_window for layer in get_attention_layers(model).values()]
    assert all(window is None or 2 * window < longest for window in windows)
    original = oracle.config.rope.scaling.get("original_max_position_embeddings")
    if original is not None and not name.endswith("-within"):
        assert longest > 1.5 * original
    assert oracle.config.vocab_size == VOCAB_SIZE


def test_every_architecture_of_the_registry_has_a_row():
    assert {family.architecture for family in FAMILIES} == set(_MODELS)


def test_every_feature_and_both_sides_of_every_switch_have_a_row():
    assert {feature for family in FAMILIES for feature in family.features} == set(FEATURES)
    for family in FAMILIES:
        if family.name.endswith("-within"):
            beyond = BY_NAME[family.name.replace("-within", "-beyond")]
            assert beyond.config == family.config
            assert beyond.max_model_len > family.max_model_len
