"""Claims about `mini-vllm convert`: the same bits under safetensors, and no pickle that wants more than tensors."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mini_vllm.entrypoints.cli.convert import parse_shard_size
from mini_vllm.entrypoints.cli.main import main
from mini_vllm.exceptions import CheckpointError, ConfigError
from mini_vllm.models import pickle_convert
from mini_vllm.models.loader import find_weight_files
from mini_vllm.models.pickle_convert import convert_folder, verify
from tests.checkpoints import make_checkpoint

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A folder as opt-125m's is published: config, tokenizer, pytorch_model.bin."""
    folder = make_checkpoint(tmp_path / "pickled", "llama", seed=1)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def original(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return tensors


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in find_weight_files(folder) for name, tensor in load_file(file).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape and ours[name].equal(tensor), name


def save(folder: Path, tensors: Any, **kwargs: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin", **kwargs)
    return folder


# --- what is written --------------------------------------------------------------------------------------


def test_the_same_bits_come_out_with_config_and_tokenizer(pickled: Path, tmp_path: Path) -> None:
    done = convert_folder(pickled, tmp_path / "out")
    assert_same(all_tensors(tmp_path / "out"), original(pickled))
    assert done.files == ("model.safetensors",) and done.num_tensors == 21
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (tmp_path / "out/config.json").read_bytes() == (pickled / "config.json").read_bytes()


def test_the_engine_runs_on_what_was_converted(
    pickled: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(pickled), str(tmp_path / "out")]) == 0
    assert "21 tensors" in capfd.readouterr().out
    command = ["generate", "--prompt", "hello", "--max-tokens", "3", "--dtype", "float32", "--num-threads", "1"]
    command += ["--num-gpu-blocks-override", "20", "--no-stream"]
    assert main([*command, "--model", str(tmp_path / "out")]) == 0
    assert main([*command, "--model", str(pickled)]) == 2
    assert f"mini-vllm convert {pickled} NEW_FOLDER" in capfd.readouterr().err


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int64", "uint8", "bool"])
def test_every_dtype_is_kept(dtype: str, tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)),
        "b": torch.tensor(1).to(getattr(torch, dtype)),
        "empty": torch.empty(0, 4, dtype=getattr(torch, dtype)),
    }
    convert_folder(save(tmp_path / "in", tensors), tmp_path / "out")
    assert_same(all_tensors(tmp_path / "out"), tensors)


def test_bits_that_are_no_number_are_kept(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC12345, 0xFF800001 - 2**32, -(2**31)], dtype=torch.int32)
    convert_folder(save(tmp_path / "in", {"w": bits.view(torch.float32)}), tmp_path / "out")
    assert all_tensors(tmp_path / "out")["w"].view(torch.int32).equal(bits)


def test_the_format_of_old_torch_is_read_too(pickled: Path, tmp_path: Path) -> None:
    old = save(tmp_path / "old", original(pickled), _use_new_zipfile_serialization=False)
    convert_folder(old, tmp_path / "out")
    assert_same(all_tensors(tmp_path / "out"), original(pickled))


def test_parameters_and_views_become_tensors_of_their_own(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"p": torch.nn.Parameter(torch.ones(3)), "rows": base[1:3], "columns": base[:, ::2], "t": base.T}
    convert_folder(save(tmp_path / "in", tensors), tmp_path / "out")
    assert_same(all_tensors(tmp_path / "out"), {name: tensor.detach() for name, tensor in tensors.items()})


def write_shards(pickled: Path) -> dict[str, torch.Tensor]:
    tensors = original(pickled)
    names = list(tensors)
    weight_map = {}
    for shard in range(3):
        file = f"pytorch_model-{shard + 1:05d}-of-00003.bin"
        torch.save({name: tensors[name] for name in names[shard::3]}, pickled / file)
        weight_map |= dict.fromkeys(names[shard::3], file)
    (pickled / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (pickled / "pytorch_model.bin").unlink()
    return tensors


def test_shards_are_read_by_their_index(pickled: Path, tmp_path: Path) -> None:
    tensors = write_shards(pickled)
    convert_folder(pickled, tmp_path / "out")
    assert_same(all_tensors(tmp_path / "out"), tensors)
    assert not (tmp_path / "out" / INDEX).exists()


def test_no_file_is_larger_than_asked_for(pickled: Path, tmp_path: Path) -> None:
    limit = 120_000
    done = convert_folder(pickled, tmp_path / "out", max_shard_bytes=limit)
    assert len(done.files) > 2
    assert_same(all_tensors(tmp_path / "out"), original(pickled))
    for file in done.files:
        assert sum(t.numel() * t.element_size() for t in load_file(tmp_path / "out" / file).values()) <= limit
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.total_bytes


# --- tied weights -----------------------------------------------------------------------------------------


def tied_folder(folder: Path, config: dict[str, Any] | None) -> Path:
    embedding = torch.randn(8, 4)
    save(folder, {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding, "n.weight": torch.ones(4)})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, None])
def test_a_tied_head_is_left_out(config: dict[str, Any] | None, tmp_path: Path) -> None:
    done = convert_folder(tied_folder(tmp_path / "in", config), tmp_path / "out")
    assert set(all_tensors(tmp_path / "out")) == {"model.embed_tokens.weight", "n.weight"}
    assert done.dropped == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_head_that_is_not_tied_is_written_even_if_it_shares_memory(tmp_path: Path) -> None:
    source = tied_folder(tmp_path / "in", {"tie_word_embeddings": False})
    done = convert_folder(source, tmp_path / "out")
    assert_same(all_tensors(tmp_path / "out"), original(source))
    assert not done.dropped


def test_other_shared_tensors_are_each_written(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    tensors = {"layers.0.weight": shared, "layers.1.weight": shared}
    convert_folder(save(tmp_path / "in", tensors), tmp_path / "out")
    assert_same(all_tensors(tmp_path / "out"), tensors)


# --- where it is written ----------------------------------------------------------------------------------


def test_nothing_is_replaced_without_force(pickled: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("mine")
    (target / "unrelated.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"has config\.json already; --force"):
        convert_folder(pickled, target)
    assert sorted(os.listdir(target)) == ["config.json", "unrelated.txt"]
    convert_folder(pickled, target, force=True)
    assert (target / "config.json").read_text() != "mine" and (target / "unrelated.txt").read_text() == "mine"


def test_force_leaves_no_shards_of_an_earlier_run(pickled: Path, tmp_path: Path) -> None:
    convert_folder(pickled, tmp_path / "out", max_shard_bytes=120_000)
    with pytest.raises(ConfigError, match="already"):
        convert_folder(pickled, tmp_path / "out")
    convert_folder(pickled, tmp_path / "out", force=True)
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert_same(all_tensors(tmp_path / "out"), original(pickled))


def test_a_folder_may_be_converted_in_place(pickled: Path) -> None:
    before = set(os.listdir(pickled))
    convert_folder(pickled, pickled)
    assert set(os.listdir(pickled)) == before | {"model.safetensors"}
    assert_same(all_tensors(pickled), original(pickled))


def test_a_failure_leaves_nothing_behind(pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pickle_convert, "save_file", lambda *args, **kwargs: fail())
    with pytest.raises(OSError, match="disk full"):
        convert_folder(pickled, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_what_is_read_back_is_compared(tmp_path: Path) -> None:
    """Broken control of the verification: one changed bit, one lost tensor."""
    tensors = {"w": torch.randn(8)}
    convert_folder(save(tmp_path / "in", tensors), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    verify(file, tensors)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="tensor w is not what was written"):
        verify(file, tensors)
    with pytest.raises(CheckpointError, match="does not hold the tensors"):
        verify(file, tensors | {"v": torch.ones(1)})


def test_code_is_never_copied(pickled: Path, tmp_path: Path) -> None:
    (pickled / "modeling_mine.py").write_text("print('hello')")
    (pickled / ".secret.json").write_text("{}")
    assert "modeling_mine.py" not in convert_folder(pickled, tmp_path / "out").copied
    assert not {"modeling_mine.py", ".secret.json"} & set(os.listdir(tmp_path / "out"))


# --- what is refused --------------------------------------------------------------------------------------


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(
    zipped: bool, nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    bomb: Any = Malicious(tmp_path / "was-run")
    payload = {"w": torch.ones(2), "x": bomb} if nested else bomb
    source = save(tmp_path / "in", payload, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: refused.*mkdir"):
        convert_folder(source, tmp_path / "out")
    assert not (tmp_path / "was-run").exists() and not (tmp_path / "out").exists()


def test_the_malicious_pickle_would_have_run(tmp_path: Path) -> None:
    """Broken control of the test above."""
    source = save(tmp_path / "in", Malicious(tmp_path / "was-run"))
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"model": {"w": torch.ones(1)}, "step": 3}, r"not only tensors by name: model, step"),
        ([torch.ones(1)], "holds list"),
        ({}, "holds dict"),
        ({3: torch.ones(1)}, "not only tensors by name: 3"),
        ({"w": torch.ones(2, 2).to_sparse()}, "tensor w is torch.sparse"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "tensor w is .*complex64"),
    ],
    ids=["training", "list", "empty", "numbers", "sparse", "complex"],
)
def test_what_is_no_plain_state_dict_is_refused(payload: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"pytorch_model\.bin: .*{message}" if "holds" not in message else message
    ):
        convert_folder(save(tmp_path / "in", payload), tmp_path / "out")


@pytest.mark.parametrize("kept", [0, 10, 500, -1000, -1])
def test_a_truncated_file_is_named(kept: int, pickled: Path, tmp_path: Path) -> None:
    file = pickled / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: "):
        convert_folder(pickled, tmp_path / "out")


def test_an_index_that_lies_is_refused(pickled: Path, tmp_path: Path) -> None:
    write_shards(pickled)
    index = json.loads((pickled / INDEX).read_text())
    moved = next(iter(index["weight_map"]))
    index["weight_map"][moved] = "pytorch_model-00003-of-00003.bin"
    (pickled / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"does not hold what .* says: {moved}"):
        convert_folder(pickled, tmp_path / "out")


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "sub/x.bin", "missing.bin"])
def test_an_index_may_not_lead_outside_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.bin").write_bytes(b"x")
    (tmp_path / "in" / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match=INDEX):
        convert_folder(tmp_path / "in", tmp_path / "out")


def test_links_may_not_lead_outside_the_folder(pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (pickled / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match=r"'vocab\.txt' leads outside"):
        convert_folder(pickled, tmp_path / "out")


def test_a_hub_cache_is_a_folder_whose_links_are_followed(pickled: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in pickled.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    convert_folder(snapshot, tmp_path / "out")
    assert len(all_tensors(tmp_path / "out")) == 21


def test_a_folder_without_pickles_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(CheckpointError, match=r"neither pytorch_model\.bin nor .*it has consolidated\.00\.pth"):
        convert_folder(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is no folder"):
        convert_folder(tmp_path / "nothing", tmp_path / "out")


def test_safetensors_need_no_conversion(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "in", tokenizer=False)
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert_folder(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MiB", 500 * 2**20), ("1.5 kb", 1500), ("7", 7), ("2gib", 2**31)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_shard_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "5XB", "-1GB", "0"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_shard_size(text)
