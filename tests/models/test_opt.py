"""OPT: positions from a table, norms on either side of the sum, embeddings of another width; and the table's end."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.exceptions import CheckpointError, ConfigError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.norm import LayerNorm
from tests.families import VOCAB_SIZE, opt
from tests.models.oracle import BROKEN, TOLERANCE
from tests.models.small import build, config_of

ROWS = ("opt", "opt-350m", "opt-galactica")
every_row = pytest.mark.parametrize("row", ROWS)


@every_row
@pytest.mark.parametrize("offset", [0, 1])
def test_control_another_offset_of_positions_fails(oracle_of, row, offset):
    oracle = oracle_of(row)
    model = oracle.model()
    model.model["decoder"].embed_positions.offset = offset
    assert oracle.error(model) > BROKEN


@every_row
def test_control_norms_on_the_other_side_of_the_sum_fail(oracle_of, row):
    oracle = oracle_of(row)
    model = oracle.model()
    for layer in model.model["decoder"].layers:
        layer.norm_first = not layer.norm_first
    assert oracle.error(model) > BROKEN


def test_control_without_the_final_norm_parity_fails(oracle_of):
    oracle = oracle_of("opt")
    model = oracle.model()
    model.model["decoder"].final_layer_norm = None
    assert oracle.error(model) > BROKEN


def test_control_a_final_norm_where_there_is_none_fails(oracle_of):
    oracle = oracle_of("opt-galactica")
    model = oracle.model()
    model.model["decoder"].final_layer_norm = LayerNorm(64, 1e-5, dtype=torch.float32)
    assert oracle.error(model) > BROKEN


@pytest.mark.parametrize("layer", ["qkv_proj", "out_proj", "fc1", "fc2"])
def test_control_a_dropped_bias_fails(oracle_of, layer):
    oracle = oracle_of("opt")
    model = oracle.model()
    next(module for name, module in model.named_modules() if name.endswith(layer)).bias.data.zero_()
    assert oracle.error(model) > BROKEN


@pytest.mark.parametrize(("row", "act", "least"), [("opt", "gelu", BROKEN), ("opt-galactica", "gelu_new", TOLERANCE)])
def test_control_another_activation_fails(oracle_of, row, act, least):
    oracle = oracle_of(row)
    assert oracle.error(oracle.model(hidden_act=act)) > least


@pytest.mark.parametrize("layer", ["project_in", "project_out"])
@pytest.mark.usefixtures("plain_weights")
def test_control_another_projection_of_embeddings_fails(oracle_of, layer):
    oracle = oracle_of("opt-350m")
    model = oracle.model()
    weight = getattr(model.model["decoder"], layer).weight
    weight.data.copy_(weight.data.roll(1, 0))
    assert oracle.error(model) > BROKEN


def test_names_without_the_outer_prefix_and_a_second_tied_copy_load(oracle_of, tmp_path):
    oracle = oracle_of("opt-350m")
    tensors = load_file(oracle.folder / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert all(name.startswith("decoder.") for name in short)
    weights = {**short, "lm_head.weight": tensors["model.decoder.embed_tokens.weight"].clone()}
    model = empty_model(oracle)
    model.load_weights(weights.items())
    assert oracle.error(model) < TOLERANCE
    with pytest.raises(CheckpointError, match=r"unexpected: decoder.layers.2.fc1.bias"):
        empty_model(oracle).load_weights({**weights, "decoder.layers.2.fc1.bias": torch.ones(96)}.items())
    with pytest.raises(CheckpointError, match=r"missing: model.decoder.embed_positions.weight"):
        empty_model(oracle).load_weights((n, t) for n, t in weights.items() if "positions" not in n)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from decoder.embed_tokens.weight"):
        empty_model(oracle).load_weights({**weights, "lm_head.weight": torch.ones(VOCAB_SIZE, 32)}.items())


def empty_model(oracle) -> nn.Module:
    from mini_vllm.models.opt import OPTForCausalLM

    return OPTForCausalLM(oracle.config, dtype=torch.float32)


def test_embeddings_may_be_given_as_embed_input_ids_gives_them(oracle_of):
    oracle = oracle_of("opt-350m")
    model = oracle.model()
    forward = model.forward
    model.forward = lambda ids, positions: forward(None, positions, None, model.embed_input_ids(ids))
    assert oracle.error(model) < TOLERANCE


def test_a_bfloat16_model_is_near_the_float32_one(oracle_of):
    oracle = oracle_of("opt")
    assert oracle.mean_error(oracle.model(dtype="bfloat16")) < 0.1 * oracle.logits[0].std()


def test_the_files_own_names_are_read_and_named_in_errors():
    config = config_of(opt())
    ours = HFConfig.from_dict(config)
    assert (ours.intermediate_size, ours.hidden_act, ours.tie_word_embeddings) == (96, "relu", True)
    del config["ffn_dim"]
    with pytest.raises(CheckpointError, match=r"config\.json: ffn_dim is missing"):
        HFConfig.from_dict(config)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"layer_norm_elementwise_affine": False}, UnsupportedModelError, "layer_norm_elementwise_affine=False"),
        ({"activation_function": "tanh"}, UnsupportedModelError, "hidden_act 'tanh' is not supported; supported are"),
        ({"do_layer_norm_before": "yes"}, CheckpointError, "do_layer_norm_before must be true or false"),
        ({"word_embed_proj_dim": 0}, CheckpointError, "word_embed_proj_dim must be an integer of at least 1"),
    ],
)
def test_options_that_would_change_results_are_refused_by_name(changes, error, named):
    with pytest.raises(error, match=named):
        build({**config_of(opt()), **changes})


# --- the end of the table, of GPT-2 too -----------------------------------------------------------------------


@pytest.mark.parametrize("row", ["opt", "gpt2"])
def test_a_max_model_len_beyond_the_table_is_refused_at_start(oracle_of, row):
    oracle = oracle_of(row)
    tokenizer = SimpleNamespace(name_or_path=str(oracle.folder), vocab_size=VOCAB_SIZE)
    for max_model_len, resolved in ((None, 128), (128, 128), ("auto", None)):
        config = EngineArgs(model=str(oracle.folder), max_model_len=max_model_len).create_engine_config(tokenizer)
        assert config.model.max_model_len == resolved
    with pytest.raises(ConfigError, match="max_model_len: 129 is more than the 128 tokens"):
        EngineArgs(model=str(oracle.folder), max_model_len=129).create_engine_config(tokenizer)
    with pytest.raises(ConfigError, match="max_model_len: 129 is more than the 128 positions that the model has"):
        oracle.model(max_model_len=129)
