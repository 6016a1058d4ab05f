"""Checkpoints on disk: read lazily, filled exactly once, and every damage named."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_vllm.config import LoadConfig, ModelConfig
from mini_vllm.distributed.parallel_state import use_tp_group
from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config import HFConfig
from mini_vllm.models import safetensors_reader
from mini_vllm.models.loader import INDEX_FILE, WEIGHTS_FILE, LazyTensor, iterate_weights, load_model
from mini_vllm.models.registry import ModelRegistry
from mini_vllm.models.utils import load_weights, make_layers, weight_bytes
from tests.checkpoints import make_checkpoint, write_safetensors
from tests.layers.test_linear import FakeGroup

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(folder, *, load_format="auto", seed=0, dtype="float32", config=None, use_tqdm=False):
    config = config or HFConfig.from_folder(folder)
    model_config = ModelConfig(str(folder), config, dtype, None, seed=seed)
    return load_model(model_config, LoadConfig(load_format, use_tqdm), torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint(tmp_path / "model", tokenizer=False)


@pytest.fixture
def sharded(tmp_path):
    return make_checkpoint(tmp_path / "sharded", tokenizer=False, num_shards=3)


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def edit_index(folder: Path, edit) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_shards_and_a_single_file_load_the_same_model(folder, sharded):
    one, many = load(folder).state_dict(), load(sharded).state_dict()
    assert one.keys() == many.keys()
    assert all(one[name].equal(many[name]) for name in one)


@pytest.mark.usefixtures("plain_weights")
def test_fused_parameters_hold_their_parts_in_order(folder):
    tensors, model = load_file(folder / WEIGHTS_FILE), load(folder)
    for layer, module in enumerate(model.model.layers):
        prefix = f"model.layers.{layer}"
        qkv = torch.cat([tensors[f"{prefix}.self_attn.{x}_proj.weight"] for x in "qkv"])
        gate_up = torch.cat([tensors[f"{prefix}.mlp.{x}_proj.weight"] for x in ("gate", "up")])
        assert module.self_attn.qkv_proj.weight.equal(qkv)
        assert module.mlp.gate_up_proj.weight.equal(gate_up)
    assert not model.training


def test_weights_are_converted_to_the_models_dtype(folder):
    model = load(folder, dtype="bfloat16")
    assert model.model.embed_tokens.weight.dtype is torch.bfloat16
    assert model.model.norm.weight.dtype is torch.bfloat16


@pytest.mark.usefixtures("plain_weights")
def test_two_ranks_load_the_halves_of_one_model(folder):
    whole, halves = load(folder), []
    for rank in range(2):
        with use_tp_group(FakeGroup(rank, 2)):
            halves.append(load(folder))
    o_proj = [half.model.layers[0].self_attn.o_proj.weight for half in halves]
    assert torch.cat(o_proj, 1).equal(whole.model.layers[0].self_attn.o_proj.weight)
    embeddings = torch.cat([half.model.embed_tokens.weight for half in halves])
    assert embeddings[:128].equal(whole.model.embed_tokens.weight[:128])


@pytest.mark.usefixtures("plain_weights")
def test_slices_are_read_from_the_file_and_nothing_else(folder, monkeypatch):
    sizes = []
    narrow = LazyTensor.narrow
    monkeypatch.setattr(LazyTensor, "narrow", lambda *a: sizes.append(part := narrow(*a)) or part)
    with use_tp_group(FakeGroup(1, 2)):
        model = load(folder)
    read, held = sum(t.numel() for t in sizes), sum(p.numel() for p in model.parameters())
    assert read == held


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_counted_whether_packed_or_not(tmp_path, tied):
    folder = make_checkpoint(tmp_path, tokenizer=False, tie_word_embeddings=tied, vocab_size=128)
    elements = sum(tensor.numel() for tensor in load_file(folder / WEIGHTS_FILE).values())
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        model = load(folder, dtype=dtype)
        packed = model.lm_head.weight is None
        # A packed head that is tied is a second copy: the embedding needs the plain one.
        assert weight_bytes(model) == size * (elements + (128 * 64 if tied and packed else 0))


# --- what does not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(Q_PROJ), f"missing: {Q_PROJ}"),
        (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "unexpected: model.extra.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "unexpected: .*q_proj.bias"),
        (lambda t: t.update({"model.layers.0.self_attn.qkv_proj.weight": torch.ones(2)}), "unexpected: .*qkv_proj"),
        (lambda t: t.update({Q_PROJ: torch.ones(32, 64)}), rf"{Q_PROJ} has shape \[32, 64\], expected \[64, 64\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), r"norm.weight has shape \[32\], expected \[64\]"),
        (lambda t: t.update({"model.norm.weight": torch.tensor(1.0)}), r"model.norm.weight has shape \[\], expected"),
        (lambda t: t.update({Q_PROJ: torch.ones(64, 64, dtype=torch.int8)}), f"{Q_PROJ} is stored as I8"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(folder, edit, named):
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=named):
        load(folder)


def test_missing_and_unexpected_are_told_together_and_long_lists_shortened(folder):
    def edit(tensors):
        for name in [n for n in tensors if "layers.1" in n]:
            tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)

    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError, match=r"missing: .*layers.1.* and 1 more; unexpected: .*layers.7.* and 1 more"):
        load(folder)


def test_rotary_buffers_of_old_checkpoints_are_ignored(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(folder)


def test_a_tensor_given_twice_is_refused(folder):
    model = load(folder)
    twice = [("model.norm.weight", torch.ones(64))] * 2
    with pytest.raises(CheckpointError, match=r"model.norm.weight is in the checkpoint twice"):
        load_weights(model, twice, model.packed_modules_mapping)


def test_a_tied_heads_copy_must_equal_the_embedding(tmp_path):
    folder = make_checkpoint(tmp_path, tokenizer=False, tie_word_embeddings=True)
    plain = load(folder).model.embed_tokens.weight
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load(folder).model.embed_tokens.weight.equal(plain)
    edit_tensors(folder, lambda t: t.pop("model.embed_tokens.weight"))
    assert load(folder).model.embed_tokens.weight.equal(plain)
    edit_tensors(folder, lambda t: t.update({"model.embed_tokens.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight differs from lm_head.weight.*tie_word_emb"):
        load(folder)


# --- damaged files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 4, 100, -1, -5000])
def test_a_truncated_file_is_refused(folder, size):
    file = folder / WEIGHTS_FILE
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole safetensors file"):
        load(folder)


def test_a_file_that_is_something_else_is_refused(folder):
    (folder / WEIGHTS_FILE).write_bytes(b"PK\x03\x04" + b"\xff" * 4096)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(folder)


def test_a_truncated_shard_is_named(sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: not a whole"):
        load(sharded)


def test_a_folder_without_weights_says_what_it_looked_for(folder):
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_never_loaded_and_the_way_out_is_told(folder, name):
    (folder / WEIGHTS_FILE).rename(folder / name)
    with pytest.raises(CheckpointError, match=r"pickled weights, which are never loaded.*convert them to safetensors"):
        load(folder)


# --- the index ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ("{", "cannot be read"),
        ("[]", "weight_map must be an object"),
        ("{}", "weight_map must be an object"),
        ('{"weight_map": {}}', "weight_map must be an object"),
        ('{"weight_map": ["a"]}', "weight_map must be an object"),
        ('{"weight_map": {"a": 1}}', r"weight_map\['a'\] must be a file name, got 1"),
        ('{"weight_map": {"a": null}}', "must be a file name"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "named twice: a"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "'gone.safetensors' cannot be found"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "must be a .safetensors file inside"),
    ],
)
def test_an_ill_formed_index_is_refused(sharded, index, named):
    (sharded / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=named) as error:
        load(sharded)
    assert INDEX_FILE in str(error.value)


@pytest.mark.parametrize("how", ["absolute", "parent", "hidden parent", "link", "linked folder"])
def test_shard_paths_that_leave_the_folder_are_refused(sharded, tmp_path, how):
    shard = "model-00001-of-00003.safetensors"
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (sharded / shard).rename(outside / shard)
    if how == "link":
        (sharded / shard).symlink_to(outside / shard)
    if how == "linked folder":
        (sharded / "sub").symlink_to(outside)
    name = {
        "absolute": str(outside / shard), "parent": f"../elsewhere/{shard}",
        "hidden parent": f"./x/../../elsewhere/{shard}", "link": shard, "linked folder": f"sub/{shard}",
    }[how]  # fmt: skip

    def edit(index):
        index["weight_map"] = {k: name if v == shard else v for k, v in index["weight_map"].items()}

    edit_index(sharded, edit)
    with pytest.raises(CheckpointError, match=r"inside the model's folder|leads outside the model's folder"):
        load(sharded)


def test_a_single_file_may_not_be_a_link_out_of_the_folder_either(folder, tmp_path):
    (folder / WEIGHTS_FILE).rename(tmp_path / "w.safetensors")
    (folder / WEIGHTS_FILE).symlink_to(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.safetensors' leads outside"):
        load(folder)


def test_the_links_of_a_hugging_face_cache_are_followed(sharded, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        os.rename(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    load(snapshot)


def test_shards_inside_a_sub_folder_are_fine(sharded):
    shard = "model-00001-of-00003.safetensors"
    (sharded / "part").mkdir()
    (sharded / shard).rename(sharded / "part" / shard)

    def edit(index):
        index["weight_map"] = {k: v.replace(shard, f"part/{shard}") for k, v in index["weight_map"].items()}

    edit_index(sharded, edit)
    load(sharded)


def test_a_shard_that_holds_other_tensors_than_the_index_says_is_refused(sharded):
    edit_index(sharded, lambda index: index["weight_map"].pop(Q_PROJ))
    with pytest.raises(CheckpointError, match=f"does not hold what .*index.json says: {Q_PROJ}"):
        load(sharded)


def test_the_same_tensor_in_two_shards_is_refused(sharded):
    file = sharded / "model-00001-of-00003.safetensors"
    other = load_file(sharded / "model-00002-of-00003.safetensors")
    name = next(iter(other))
    save_file(load_file(file) | {name: other[name]}, file)
    with pytest.raises(CheckpointError, match=f"does not hold what .*: {name}"):
        load(sharded)


def test_progress_is_shown_on_a_terminal_when_asked_and_never_elsewhere(sharded, capsys, monkeypatch):
    monkeypatch.setattr(safetensors_reader, "PROGRESS_DELAY_SECONDS", 0)
    load(sharded, use_tqdm=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(sharded)
    assert capsys.readouterr().err == ""
    load(sharded, use_tqdm=True)
    shown = capsys.readouterr().err
    assert "Loading safetensors: 100%" in shown and "B/s" in shown
    monkeypatch.undo()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(sharded, use_tqdm=True)
    assert capsys.readouterr().err == "", "what is loaded at once needs no bar"


def test_the_log_says_how_much_was_read_and_what_packing_took(sharded, caplog):
    with caplog.at_level("INFO", "mini_vllm"):
        load(sharded)
    size = sum(tensor.numel() * 4 for shard in sharded.glob("*.safetensors") for tensor in load_file(shard).values())
    line = (
        rf"Read {size / 2**20:.1f} MiB of weights from 3 safetensors files \(\d+\.\d\d s waiting for the disk\): .* pr"
    )
    assert any(re.match(line, message) for message in caplog.messages), caplog.messages


# --- dummy weights, registry, layers ---------------------------------------------------------------------


@pytest.mark.usefixtures("plain_weights")
def test_dummy_weights_need_no_files_and_depend_on_the_seed_only(folder):
    (folder / WEIGHTS_FILE).unlink()
    first, again, other = (load(folder, load_format="dummy", seed=s).state_dict() for s in (3, 3, 4))
    assert all(first[name].equal(again[name]) for name in first)
    changed = [name for name in first if not first[name].equal(other[name])]
    assert {n for n in first if n not in changed} == {n for n in first if "norm" in n or "inv_freq" in n}
    weight = first["model.layers.0.mlp.down_proj.weight"]
    assert 0.015 < weight.std() < 0.025
    assert all(tensor.isfinite().all() for tensor in first.values())


def test_the_first_supported_architecture_is_taken_and_others_listed():
    model_class = ModelRegistry.resolve(["Unheard", "Qwen2ForCausalLM"])
    assert model_class.__name__ == "Qwen2ForCausalLM"
    with pytest.raises(UnsupportedModelError, match=r"\['Unheard'\].*LlamaForCausalLM, .*Qwen2ForCausalLM"):
        ModelRegistry.resolve(["Unheard"])


def test_layers_outside_a_range_are_empty_slots():
    layers = make_layers(4, lambda prefix: torch.nn.Linear(len(prefix), 1), "model.layers", start=1, end=3)
    assert [type(layer).__name__ for layer in layers] == ["Identity", "Linear", "Linear", "Identity"]
    assert layers[1].in_features == len("model.layers.1")


def test_checkpoints_for_tests_are_the_same_bytes_each_time(tmp_path):
    files = [make_checkpoint(tmp_path / str(i), "qwen2") for i in range(2)]
    for name in sorted(p.name for p in files[0].iterdir()):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes(), name


def test_lazy_tensors_read_any_dimension(tmp_path):
    matrix = torch.arange(24.0).view(4, 6)
    write_safetensors(tmp_path, {"a": matrix})
    for name, tensor in iterate_weights(tmp_path):
        assert (name, tuple(tensor.shape)) == ("a", (4, 6))
        assert tensor.narrow(0, 1, 2).equal(matrix[1:3])
        assert tensor.narrow(1, 2, 3).equal(matrix[:, 2:5])
