"""GPT-2: matrices the other way round, fused in the file, names with and without prefix, masks among the weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.linear import QKVParallelLinear, RowParallelLinear
from tests.families import gpt2
from tests.layers.test_linear import NarrowOnly, on_ranks, randn
from tests.models.oracle import BROKEN, TOLERANCE
from tests.models.small import build, config_of

BOTH = pytest.mark.parametrize("row", ["gpt2", "gpt2-untied-scores-by-layer"])


@BOTH
@pytest.mark.usefixtures("plain_weights")
def test_control_a_square_matrix_taken_as_it_is_fails(oracle_of, row):
    oracle = oracle_of(row)
    model = oracle.model()
    weight = model.transformer.h[0].attn.c_proj.weight
    weight.data.copy_(weight.data.t().clone())
    assert oracle.error(model) > BROKEN


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
@pytest.mark.usefixtures("plain_weights")
def test_control_another_order_of_query_key_and_value_fails(oracle_of, order):
    oracle = oracle_of("gpt2")
    model = oracle.model()
    for block in model.transformer.h:
        for param in (block.attn.c_attn.weight, block.attn.c_attn.bias):
            parts = param.data.clone().chunk(3)
            param.data.copy_(torch.cat([parts[i] for i in order]))
    assert oracle.error(model) > BROKEN


@BOTH
def test_control_positions_off_by_one_fail(oracle_of, row):
    oracle = oracle_of(row)
    model = oracle.model()
    table = model.transformer.wpe.weight
    table.data.copy_(table.data.roll(1, 0))
    assert oracle.error(model) > BROKEN


@pytest.mark.parametrize("layer", ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "ln_1", "ln_2", "ln_f"])
def test_control_a_dropped_bias_fails(oracle_of, layer):
    oracle = oracle_of("gpt2")
    model = oracle.model()
    next(module for name, module in model.named_modules() if name.endswith(layer)).bias.data.zero_()
    assert oracle.error(model) > BROKEN


@pytest.mark.parametrize(("row", "act"), [("gpt2", "gelu"), ("gpt2-untied-scores-by-layer", "gelu_new")])
def test_control_the_other_gelu_fails(oracle_of, row, act):
    oracle = oracle_of(row)
    assert oracle.error(oracle.model(hidden_act=act)) > 5 * TOLERANCE


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ("gpt2-untied-scores-by-layer", {"scale_attn_by_inverse_layer_idx": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"layer_norm_epsilon": 0.5}),
    ],
)
def test_control_another_option_fails(oracle_of, row, changes):
    oracle = oracle_of(row)
    assert oracle.error(oracle.model(raw={**oracle.config.raw, **changes})) > BROKEN


# --- what is in the file --------------------------------------------------------------------------------------


@pytest.fixture
def rewritten(oracle_of, tmp_path):
    """The row's model from its tensors under other names, or with others beside them."""

    def load(change):
        oracle = oracle_of("gpt2")
        tensors = load_file(oracle.folder / "model.safetensors")
        assert all(name.startswith("transformer.") for name in tensors)
        save_file(change(tensors), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((oracle.folder / "config.json").read_text())
        moved = type(oracle)(oracle.family, tmp_path, oracle.config, oracle.hf_model, oracle.prompts, oracle.logits)
        return moved.error(moved.model())

    return load


def without_prefix(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def test_names_without_the_prefix_load(rewritten):
    assert rewritten(without_prefix) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_causal_masks_among_the_weights_are_skipped(rewritten, dtype):
    def change(tensors):
        mask = torch.ones(1, 1, 128, 128).tril().to(dtype)
        masks = {f"h.{i}.attn.bias": mask.clone() for i in range(2)}
        return {**without_prefix(tensors), **masks, "h.0.attn.masked_bias": torch.tensor(-1e4)}

    assert rewritten(change) < TOLERANCE


def test_a_tied_head_of_its_own_loads_if_it_is_the_embedding(rewritten):
    assert rewritten(lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()}) < TOLERANCE
    with pytest.raises(
        CheckpointError, match=r"differs from (lm_head|transformer\.wte)\.weight, but config\.json ties them"
    ):
        rewritten(lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] + 1})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {**t, "h.0.attn.extra": torch.ones(1)}, r"unexpected: h\.0\.attn\.extra"),
        (lambda t: {**t, "h.0.ln_1.bias": torch.ones(64)}, r"h\.0\.ln_1\.bias"),
        (lambda t: {n: x for n, x in t.items() if "wpe" not in n}, r"missing: transformer\.wpe\.weight"),
        (
            lambda t: {**t, "transformer.h.0.mlp.c_fc.weight": t["transformer.h.0.mlp.c_fc.weight"].t().contiguous()},
            r"transformer\.h\.0\.mlp\.c_fc\.weight has shape",
        ),
        (lambda t: {**t, "transformer.wpe.weight": torch.ones(64, 64)}, r"wpe\.weight has shape \[64, 64\]"),
    ],
)
def test_what_does_not_fit_is_named(rewritten, change, named):
    with pytest.raises(CheckpointError, match=named):
        rewritten(change)


def test_each_rank_reads_its_columns_of_a_transposed_matrix_only():
    whole = randn(64, 192)
    layers = on_ranks(2, lambda: QKVParallelLinear(64, 16, 4, 4, dtype=torch.float32).load_transposed())
    query, key, value = whole.t().chunk(3)
    for rank, layer in enumerate(layers):
        file = NarrowOnly(whole)
        layer.weight.weight_loader(layer.weight, file)
        assert layer.weight.equal(torch.cat([part.chunk(2)[rank] for part in (query, key, value)]))
        assert file.read == whole.numel() // 2
    rows = on_ranks(2, lambda: RowParallelLinear(64, 192, bias=True, dtype=torch.float32).load_transposed())
    for rank, layer in enumerate(rows):
        layer.weight.weight_loader(layer.weight, whole)
        assert layer.weight.equal(whole.t()[:, rank * 32 : rank * 32 + 32])
        layer.bias.weight_loader(layer.bias, randn(192))
        assert layer.bias.equal(randn(192))


# --- how config.json is understood ----------------------------------------------------------------------------


def test_the_files_own_names_are_read_and_named_in_errors():
    config = config_of(gpt2())
    ours = HFConfig.from_dict(config)
    sizes = (ours.hidden_size, ours.num_attention_heads, ours.num_key_value_heads, ours.head_dim)
    assert sizes == (64, 4, 4, 16)
    assert (ours.num_hidden_layers, ours.max_position_embeddings) == (2, 128)
    assert (ours.intermediate_size, ours.hidden_act, ours.tie_word_embeddings) == (256, "gelu_new", True)
    assert HFConfig.from_dict({**config, "n_inner": None}).intermediate_size == 256
    assert HFConfig.from_dict({**config, "n_inner": 100}).intermediate_size == 100
    for key in ("n_embd", "n_head", "n_layer", "n_positions"):
        with pytest.raises(CheckpointError, match=rf"config\.json: {key} is missing"):
            HFConfig.from_dict({name: value for name, value in config.items() if name != key})


def test_an_option_that_would_change_results_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"add_cross_attention=True is not supported.*'gpt2'"):
        build(config_of(gpt2(add_cross_attention=True)))
