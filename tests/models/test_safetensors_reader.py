"""Tensors that stay in their files: read ahead by threads within bounds, in one order, and let go when used."""

import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_vllm.exceptions import CheckpointError
from mini_vllm.models import safetensors_reader as reader
from mini_vllm.models.loader import iterate_weights
from mini_vllm.models.safetensors_reader import LazyTensor, MappedFile, WeightFiles
from mini_vllm.weight_files import INDEX_FILE, find_weight_files
from tests.checkpoints import make_checkpoint, write_safetensors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "sharded", tokenizer=False, num_shards=3)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-weights")]


def write_raw(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file written by hand, so that it can lie. length: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


# --- what is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_are_those_the_library_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"b": torch.randn(3, 5, 2), "a": torch.randn(7), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path, tensors)
    seen = {}
    with WeightFiles(find_weight_files(tmp_path)) as files:
        for name, tensor in files.tensors():
            assert isinstance(tensor, LazyTensor) and tuple(tensor.shape) == tensors[name].shape
            seen[name] = tensor.narrow(0, 0, tensor.shape[0]).clone() if tensor.shape else tensor._whole().clone()
    assert seen.keys() == tensors.keys()
    assert all(seen[name].equal(tensors[name]) and seen[name].dtype is dtype for name in seen)


def test_tensors_that_do_not_begin_at_a_multiple_of_their_size_are_read(tmp_path: Path) -> None:
    values = torch.arange(6.0)
    header = {
        "odd": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
        "a": {"dtype": "F32", "shape": [6], "data_offsets": [2, 26]},
    }
    file = tmp_path / "x.safetensors"
    write_raw(file, header, b"\0\0" + values.numpy().tobytes())
    tensors = {tensor.name: tensor for tensor in MappedFile(file, None).tensors}
    assert tensors["a"].narrow(0, 1, 4).equal(values[1:5])


def test_the_order_is_that_of_the_files_whatever_the_threads_do(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> list[str]:
        return [name for name, _ in iterate_weights(sharded)]

    expected = names()
    assert len(expected) == 21 and expected[0] in load_file(sharded / "model-00001-of-00003.safetensors")
    monkeypatch.setattr(reader, "READ_PIECE_BYTES", 1000)
    for window in (0, 5000, 10**9):
        monkeypatch.setattr(reader, "READ_AHEAD_BYTES", window)
        assert names() == expected


def test_no_more_than_the_window_is_read_ahead_and_every_byte_once(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "READ_AHEAD_BYTES", 40_000)
    monkeypatch.setattr(reader, "READ_PIECE_BYTES", 3_000)
    begun: list[tuple[str, int, int]] = []
    begin = reader._begin

    def record(pool: Any, tensor: LazyTensor) -> Any:
        begun.extend((tensor.file.path.name, *piece) for piece in reader._pieces(tensor))
        return begin(pool, tensor)

    monkeypatch.setattr(reader, "_begin", record)
    used, most_ahead = 0, 0
    with WeightFiles(find_weight_files(sharded)) as files:
        for _, tensor in files.tensors():
            used += tensor.num_bytes
            most_ahead = max(most_ahead, sum(stop - start for _, start, stop in begun) - used)
        assert len(begun) == len(set(begun)) and sum(stop - start for _, start, stop in begun) == files.total_bytes
    assert 30_000 < most_ahead <= 40_000


def test_several_places_are_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(reader.READER_THREADS)  # nobody passes until so many have come
    first = iter(range(reader.READER_THREADS))
    read, files_read = MappedFile.read, set()

    def meet(self: MappedFile, start: int, stop: int) -> None:
        if next(first, None) is not None:
            files_read.add(self.path.name)
            together.wait(timeout=20)
        read(self, start, stop)

    monkeypatch.setattr(MappedFile, "read", meet)
    few = {f"t{i}": torch.full((4, 4), float(i)) for i in range(6)}
    write_safetensors(tmp_path, few, num_shards=3)
    assert {name: float(tensor.narrow(0, 0, 1)[0, 0]) for name, tensor in iterate_weights(tmp_path)} == {
        f"t{i}": float(i) for i in range(6)
    }
    assert len(files_read) >= 2, "more than one shard"


def test_used_pages_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    tensor = torch.randn(64, 4096)
    write_safetensors(tmp_path, {"a": tensor})
    with WeightFiles(find_weight_files(tmp_path)) as files:
        ((_, lazy),) = files.tensors()
        assert lazy.narrow(0, 0, 64).equal(tensor)
        lazy.file.forget(lazy.start, lazy.stop)
        assert lazy.narrow(0, 0, 64).equal(tensor)


def test_a_reader_that_fails_is_an_error_where_its_tensor_is_due(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [name for name, _ in iterate_weights(sharded)]
    with WeightFiles(find_weight_files(sharded)) as files:
        bad = next(tensor for file in files._files for tensor in file.tensors if tensor.name == order[5])
    read = MappedFile.read

    def fail(self: MappedFile, start: int, stop: int) -> None:
        if (self.path, start) == (bad.file.path, bad.start):
            raise OSError("the disk is gone")
        read(self, start, stop)

    monkeypatch.setattr(MappedFile, "read", fail)
    seen = []
    with pytest.raises(
        CheckpointError, match=rf"^{bad.file.path.name}: tensor {bad.name} cannot be .*the disk is gone"
    ):
        seen.extend(name for name, _ in iterate_weights(sharded))
    assert seen == order[:5] and reading_threads() == []


def test_leaving_in_the_middle_ends_the_threads_and_closes_the_files(sharded: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with WeightFiles(find_weight_files(sharded)) as files:
        next(files.tensors())
        assert reading_threads()
    assert not reading_threads()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


# --- files that lie -------------------------------------------------------------------------------------------

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": F32}, b"\0" * 8, 2**63), ({"a": F32}, b"\0" * 8, 2**40), ({"a": F32}, b"\0" * 8, 10**8),
        ({"a": F32}, b"\0" * 7, None), ({"a": F32}, b"\0" * 9, None), ({"a": F32}, b"", None),
        ({"a": F32 | {"shape": [3]}}, b"\0" * 8, None), ({"a": F32 | {"shape": [-2]}}, b"\0" * 8, None),
        ({"a": F32 | {"shape": [2**62, 2**62]}}, b"\0" * 8, None), ({"a": F32 | {"shape": [2**61]}}, b"\0" * 8, None),
        ({"a": F32 | {"data_offsets": [8, 0]}}, b"\0" * 8, None), ({"a": F32 | {"data_offsets": [0]}}, b"\0" * 8, None),
        ({"a": F32 | {"data_offsets": [0, 2**60]}}, b"\0" * 8, None), ({"a": F32 | {"dtype": "X9"}}, b"\0" * 8, None),
        ({"a": F32, "b": F32}, b"\0" * 8, None), ({"a": F32 | {"data_offsets": [4, 12]}}, b"\0" * 12, None),
        ({"a": 3}, b"", None), ([], b"", None), (b"{", b"", None), (b"\xff\xfe", b"", None), (b"", b"", None),
        (b'{"a":' + json.dumps(F32).encode() + b',"a":' + json.dumps(F32).encode() + b"}", b"\0" * 8, None),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused_naming_the_file(
    tmp_path: Path, header: Any, data: bytes, length: int | None
) -> None:
    write_raw(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole safetensors file"):
        list(iterate_weights(tmp_path))


def test_the_honest_file_of_these_is_read(tmp_path: Path) -> None:
    """Broken control of the test above: it is the lies that are refused, not the way of writing."""
    write_raw(tmp_path / "model.safetensors", {"a": F32, "__metadata__": {"x": "y"}}, b"\0" * 8)
    assert [name for name, _ in iterate_weights(tmp_path)] == ["a"]


def test_shards_that_changed_places_are_refused_before_anything_is_read(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedFile, "read", lambda *args: pytest.fail("something was read"))
    first, second = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    first.rename(sharded / "x")
    second.rename(first)
    (sharded / "x").rename(second)
    with pytest.raises(CheckpointError, match=f"^{first.name}: does not hold what {INDEX_FILE} says: "):
        list(iterate_weights(sharded))


def test_the_last_shard_is_checked_before_the_first_is_read(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MappedFile, "read", lambda *args: pytest.fail("something was read"))
    last = sharded / "model-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"^{last.name}: not a whole safetensors file"):
        list(iterate_weights(sharded))


def test_tensors_that_are_no_floats_may_lie_beside_weights_until_they_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"mask": torch.ones(2, 2, dtype=torch.bool), "w": torch.ones(2, 2)}, file)
    tensors: dict[str, Any] = {}
    for name, tensor in iterate_weights(tmp_path):
        tensors[name] = tensor
        if name == "mask":
            with pytest.raises(CheckpointError, match=r"is stored as BOOL, not as floats, in model.safetensors"):
                tensor.narrow(0, 0, 1)
    assert set(tensors) == {"mask", "w"}


# --- memory -----------------------------------------------------------------------------------------------------

MEASURE = """
import sys
import torch
from mini_vllm.config import LoadConfig, ModelConfig
from mini_vllm.hf_config import HFConfig
from mini_vllm.models import finishing, llama, safetensors_reader
from mini_vllm.models.loader import load_model
from mini_vllm.models.utils import weight_bytes

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

torch.set_num_threads(1)
safetensors_reader.READ_AHEAD_BYTES = 2 << 20
small, large, how = sys.argv[1:]
if how == "keeps everything":
    safetensors_reader.MappedFile.forget = lambda *args: None
    keep = []
    finish = finishing.LayerFinisher._finish
    def keeping(self, layer):
        keep.extend(param.data for param in layer.parameters(recurse=False))
        finish(self, layer)
    finishing.LayerFinisher._finish = keeping
def load(folder):
    config = ModelConfig(folder, HFConfig.from_folder(folder), "float32", None)
    return load_model(config, LoadConfig(use_tqdm=False), torch.device("cpu"))
load(small)  # whatever libraries allocate once
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = load(large)
print(status("VmHWM") - before, status("VmRSS") - before, weight_bytes(model))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_loading_needs_one_layer_more_than_the_model_and_no_second_copy(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "tokenizer": False,
        "hidden_size": 512,
        "num_heads": 8,
        "num_kv_heads": 8,
        "vocab_size": 512,
    }
    small = make_checkpoint(tmp_path / "small", **shape, intermediate_size=4096, num_layers=1)
    large = make_checkpoint(tmp_path / "large", **shape, intermediate_size=4096, num_layers=5, num_shards=4)
    layer = 4 * 512 * (4 * 512 + 3 * 4096)

    def measure(how: str) -> list[int]:
        command = [sys.executable, "-c", MEASURE, str(small), str(large), how]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "MINI_VLLM_LOGGING_LEVEL": "ERROR"}
        return [int(x) for x in subprocess.check_output(command, env=environment, text=True, timeout=60).split()]

    slack = 4 << 20
    peak, final, weights = measure("as it is")
    assert weights > 4 * layer
    assert peak <= max(final, weights) + layer + slack, f"peak {peak}, final {final}, weights {weights}, layer {layer}"
    worse, _, _ = measure("keeps everything")
    assert worse > weights + layer + slack, "broken control"
