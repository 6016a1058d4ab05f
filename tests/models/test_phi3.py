"""Phi-3: projections that come fused, longrope on either side of its switch, partial rotation."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_vllm.distributed.parallel_state import use_tp_group
from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.linear import RowRange
from mini_vllm.models.loader import LazyTensor
from tests.families import BY_NAME, longrope, phi3
from tests.layers.test_linear import FakeGroup
from tests.models.oracle import BROKEN, Oracle
from tests.models.small import build, config_of

QKV = "model.layers.1.self_attn.qkv_proj.weight"
GATE_UP = "model.layers.0.mlp.gate_up_proj.weight"


# --- fused tensors --------------------------------------------------------------------------------------------


def exchange(param: torch.Tensor, sizes: list[int], order: list[int]) -> None:
    parts = param.data.split(sizes)
    param.data.copy_(torch.cat([parts[i] for i in order]))


@pytest.mark.usefixtures("plain_weights")
def test_control_fused_queries_keys_and_values_in_another_order_fail(oracle_of):
    oracle = oracle_of("phi3-window")
    model = oracle.model()
    exchange(model.model.layers[1].self_attn.qkv_proj.weight, [64, 32, 32], [0, 2, 1])
    assert oracle.error(model) > BROKEN


@pytest.mark.usefixtures("plain_weights")
def test_control_gate_and_up_exchanged_fail(oracle_of):
    oracle = oracle_of("phi3-window")
    model = oracle.model()
    exchange(model.model.layers[0].mlp.gate_up_proj.weight, [96, 96], [1, 0])
    assert oracle.error(model) > BROKEN


@pytest.fixture
def copy(oracle_of, tmp_path) -> Oracle:
    """A checkpoint that a test may damage."""
    oracle = oracle_of("phi3-window")
    for file in oracle.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return dataclasses.replace(oracle, folder=tmp_path)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(QKV), f"missing: {QKV}"),
        (lambda t: t.update({QKV: torch.ones(96, 64)}), rf"{QKV} has shape \[96, 64\], expected \[128, 64\]"),
        (lambda t: t.update({GATE_UP: torch.ones(96, 64)}), rf"{GATE_UP} has shape \[96, 64\], expected \[192, 64\]"),
        (
            lambda t: t.update({QKV.replace("qkv", "q"): t.pop(QKV)[:64].clone()}),
            f"missing: {QKV}; unexpected: .*q_proj.weight",
        ),
    ],
)  # fmt: skip
def test_fused_tensors_that_do_not_fit_are_named_as_the_file_names_them(copy, edit, named):
    tensors = load_file(copy.folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        copy.model()


@pytest.mark.usefixtures("plain_weights")
def test_two_ranks_read_their_heads_out_of_the_fused_tensor_and_nothing_else(oracle_of, monkeypatch):
    oracle, halves, read = oracle_of("phi3-window"), [], []
    whole = oracle.model()
    narrow = LazyTensor.narrow
    monkeypatch.setattr(LazyTensor, "narrow", lambda *args: read.append(part := narrow(*args)) or part)
    for rank in range(2):
        with use_tp_group(FakeGroup(rank, 2)):
            halves.append(oracle.model())
    for path, sizes in (("self_attn.qkv_proj", [64, 32, 32]), ("mlp.gate_up_proj", [96, 96])):
        parts = [half.get_submodule(f"model.layers.1.{path}").weight.split([n // 2 for n in sizes]) for half in halves]
        expected = whole.get_submodule(f"model.layers.1.{path}").weight.split(sizes)
        assert all(torch.cat(pair).equal(part) for pair, part in zip(zip(*parts, strict=True), expected, strict=True))
    assert sum(part.numel() for part in read) == sum(p.numel() for half in halves for p in half.parameters())


def test_a_range_of_rows_is_a_tensor_of_its_own():
    matrix = torch.arange(40.0).view(8, 5)
    rows = RowRange(matrix, 3, 4)
    assert rows.shape == (4, 5)
    assert rows.narrow(0, 1, 2).equal(matrix[4:6])
    assert rows.narrow(1, 2, 3).equal(matrix[3:7, 2:5])


# --- longrope and partial rotation ----------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "other_length"), [("phi3-longrope-within", 65), ("phi3-longrope-beyond", 64)])
def test_control_the_factors_of_the_other_side_fail(oracle_of, row, other_length):
    oracle = oracle_of(row)
    assert oracle.error(oracle.model(max_model_len=other_length)) > BROKEN


def test_the_switch_is_just_above_the_original_context(oracle_of):
    within, beyond = oracle_of("phi3-longrope-within"), oracle_of("phi3-longrope-beyond")
    assert within.model(64).model.rotary_emb.inv_freq.equal(within.model(1).model.rotary_emb.inv_freq)
    assert beyond.model(65).model.rotary_emb.inv_freq.equal(beyond.model(128).model.rotary_emb.inv_freq)
    assert not within.model(64).model.rotary_emb.inv_freq.equal(within.model(65).model.rotary_emb.inv_freq)


def test_control_without_the_attention_factor_parity_fails(oracle_of):
    oracle = oracle_of("phi3-longrope-beyond")
    model = oracle.model()
    assert model.model.rotary_emb.attention_factor > 1.05
    model.model.rotary_emb.attention_factor = 1.0
    assert oracle.error(model) > BROKEN


def test_control_full_instead_of_partial_rotation_fails(oracle_of):
    oracle = oracle_of("phi4-mini")
    factors = longrope(8)["rope_scaling"]
    scaling = oracle.config.rope.scaling | {name: factors[name] for name in ("short_factor", "long_factor")}
    rope = dataclasses.replace(oracle.config.rope, partial_rotary_factor=1.0, scaling=scaling)
    assert oracle.error(oracle.model(rope=rope)) > BROKEN


@pytest.mark.parametrize("window", [14, 16, None])
def test_control_a_window_off_by_one_fails(oracle_of, window):
    oracle = oracle_of("phi3-window")
    assert oracle.error(oracle.model(sliding_window=window)) > BROKEN


@pytest.mark.parametrize("spelling", ["su", "yarn", "longrope"])
def test_older_names_of_longrope_mean_the_same(spelling):
    config = BY_NAME["phi3-longrope-beyond"].full_config()
    scaling = {key: value for key, value in config["rope_scaling"].items() if key not in ("type", "rope_type")}
    respelt = HFConfig.from_dict(config | {"rope_scaling": {"type": spelling, **scaling}})
    assert respelt.rope == HFConfig.from_dict(config).rope
    assert respelt.rope.rope_type == "longrope"


def test_factor_lists_of_another_length_are_refused():
    with pytest.raises(CheckpointError, match=r"long_factor must have a number for each of the 8 pairs.*got 6"):
        build(config_of(phi3(**longrope(6))), max_model_len=128)


@pytest.mark.parametrize("option", ["attention_bias", "mlp_bias", "lm_head_bias"])
def test_options_the_family_does_not_have_are_refused_by_name(option):
    with pytest.raises(UnsupportedModelError, match=f"{option}=True is not supported.*'phi3'"):
        build(config_of(phi3(**{option: True})))
