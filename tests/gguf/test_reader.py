"""Claims about opening GGUF files: metadata and tensors as written, and a typed error for every kind of damage."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.exceptions import CheckpointError, MiniVLLMError, UnsupportedModelError
from mini_vllm.gguf.config import config_dict
from mini_vllm.gguf.reader import is_gguf_path, open_gguf, resolve_gguf_path
from tests.checkpoints import make_checkpoint
from tests.gguf.writer import finish, matrices_as, write_gguf

MATRIX = np.arange(64, dtype=np.float32).reshape(2, 32)


def small_file(path: Path, **arguments: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **arguments)
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.eps", 1e-6)
    writer.add_array("a.words", ["one", "zwei 東京"])
    writer.add_array("a.flags", [True, False])
    writer.add_tensor("m.weight", MATRIX)
    writer.add_tensor("q.weight", gguf.quantize(MATRIX, Type.Q8_0), raw_dtype=Type.Q8_0)
    finish(writer)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_file(tmp_path_factory.mktemp("gguf") / "small.gguf")


def damaged(whole: Path, target: Path, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    target.write_bytes(change(bytearray(whole.read_bytes())))
    return target


# --- what is read -----------------------------------------------------------------------------------------


def test_metadata_comes_back_as_it_was_written(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    values = {
        "uint8": 200, "int8": -3, "uint16": 60000, "int16": -30000, "uint32": 2**32 - 1, "int32": -5,
        "uint64": 2**60, "int64": -(2**60), "float64": 0.1, "bool": True, "string": "naïve 🙂",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_array("test.ints", [1, -2, 3])
    writer.add_array("test.floats", [0.5, -1.0])
    writer.add_array("test.bools", [True, False])
    writer.add_array("test.strings", ["", "a b", "東"])
    finish(writer)
    metadata = open_gguf(tmp_path / "x.gguf").metadata
    assert {kind: metadata[f"test.{kind}"] for kind in values} == values
    assert metadata["test.ints"] == [1, -2, 3] and metadata["test.floats"] == [0.5, -1.0]
    assert metadata["test.bools"] == [True, False] and metadata["test.strings"] == ["", "a b", "東"]


def test_a_float32_comes_back_as_the_decimal_that_was_meant(whole: Path) -> None:
    assert open_gguf(whole).metadata["a.eps"] == 1e-6


def test_tensors_have_their_shape_and_numbers(whole: Path) -> None:
    file = open_gguf(whole)
    assert file.architecture == "llama" and list(file.tensors) == ["m.weight", "q.weight"]
    np.testing.assert_array_equal(file.tensors["m.weight"].read_rows(), MATRIX)
    quantised = file.tensors["q.weight"]
    assert quantised.shape == (2, 32) and quantised.kind.name == "Q8_0" and quantised.raw.shape == (2, 34)
    np.testing.assert_array_equal(quantised.read_rows([1]), quantised.read_rows()[1:])


def test_numbers_stay_in_the_file_until_they_are_read(whole: Path) -> None:
    assert not open_gguf(whole).tensors["m.weight"].raw.flags.owndata


def test_other_alignments_are_followed(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("m.weight", MATRIX)
    finish(writer)
    np.testing.assert_array_equal(open_gguf(tmp_path / "x.gguf").tensors["m.weight"].read_rows(), MATRIX)


# --- which file -------------------------------------------------------------------------------------------


def test_a_folder_with_one_model_stands_for_it(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole.read_bytes())
    assert is_gguf_path(tmp_path) and resolve_gguf_path(tmp_path) == tmp_path / "m.gguf"
    (tmp_path / "n.gguf").write_bytes(whole.read_bytes())
    assert not is_gguf_path(tmp_path)
    with pytest.raises(CheckpointError, match=r"exactly one GGUF model, found m\.gguf, n\.gguf"):
        resolve_gguf_path(tmp_path)


def test_a_folder_with_a_config_is_no_gguf_model(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole.read_bytes())
    (tmp_path / "config.json").write_text("{}")
    assert not is_gguf_path(tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*nothing\.gguf"):
        open_gguf(tmp_path / "nothing.gguf")


def split_model(folder: Path) -> Path:
    checkpoint = make_checkpoint(folder / "model", "llama", seed=1)
    write_gguf(checkpoint, folder / "x.gguf", matrices_as(Type.F16), split_max_tensors=8)
    return folder / "x-00001-of-00003.gguf"


def test_a_split_model_is_opened_as_one(tmp_path: Path) -> None:
    first = split_model(tmp_path)
    file = open_gguf(first)
    assert len(file.tensors) == 21 and config_dict(file)["num_hidden_layers"] == 2


def test_a_folder_with_one_split_model_stands_for_it(tmp_path: Path) -> None:
    first = split_model(tmp_path)
    assert resolve_gguf_path(tmp_path) == first


def test_a_missing_part_of_a_split_model_is_named(tmp_path: Path) -> None:
    first = split_model(tmp_path)
    (tmp_path / "x-00002-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"x-00002-of-00003\.gguf: missing"):
        open_gguf(first)


def test_a_later_part_of_a_split_model_asks_for_the_first(tmp_path: Path) -> None:
    split_model(tmp_path)
    with pytest.raises(CheckpointError, match="give the first"):
        open_gguf(tmp_path / "x-00002-of-00003.gguf")


# --- damage -----------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_a_typed_error_or_whole(whole: Path, tmp_path: Path) -> None:
    size = len(whole.read_bytes())
    for end in range(size):
        file = damaged(whole, tmp_path / "x.gguf", lambda data, end=end: data[:end])
        try:
            tensors = open_gguf(file).tensors
        except CheckpointError as error:
            assert "x.gguf" in str(error)
        else:
            assert end > size - 32 and len(tensors) == 2  # only the padding after the last tensor was lost


@given(offset=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_is_never_an_untyped_error(whole: Path, offset: int, value: int) -> None:
    def change(data: bytearray) -> bytearray:
        data[offset % len(data)] = value
        return data

    file = damaged(whole, whole.with_name("changed.gguf"), change)
    try:
        for tensor in open_gguf(file).tensors.values():
            with np.errstate(all="ignore"):
                tensor.read_rows()
    except MiniVLLMError:
        pass


def test_another_format_is_told_by_its_first_bytes(whole: Path, tmp_path: Path) -> None:
    file = damaged(whole, tmp_path / "x.gguf", lambda data: b"GGML" + data[4:])
    with pytest.raises(CheckpointError, match=r"x\.gguf: no GGUF file: it begins with b'GGML'"):
        open_gguf(file)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CheckpointError, match=r"x\.gguf: cannot be read"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(("version", "hint"), [(1, "version 1;"), (9, "version 9;"), (3 << 24, "big-endian")])
def test_other_versions_are_refused(version: int, hint: str, whole: Path, tmp_path: Path) -> None:
    file = damaged(whole, tmp_path / "x.gguf", lambda data: data[:4] + struct.pack("<I", version) + data[8:])
    with pytest.raises(UnsupportedModelError, match=hint):
        open_gguf(file)


def test_lengths_are_not_believed(whole: Path, tmp_path: Path) -> None:
    """A claim of 2^60 strings must not allocate anything."""
    data = whole.read_bytes()
    at = data.index(b"a.words") + len("a.words") + 8
    file = damaged(whole, tmp_path / "x.gguf", lambda d: d[:at] + struct.pack("<Q", 2**60) + d[at + 8 :])
    with pytest.raises(CheckpointError, match=r"x\.gguf: truncated: a\.words"):
        open_gguf(file)


def test_a_tensor_past_the_end_is_named(whole: Path, tmp_path: Path) -> None:
    file = damaged(whole, tmp_path / "x.gguf", lambda data: data[:-80])
    with pytest.raises(CheckpointError, match=r"x\.gguf: truncated: tensor q\.weight would end at byte"):
        open_gguf(file)


def test_rows_must_be_whole_blocks(tmp_path: Path) -> None:
    data = small_file(tmp_path / "x.gguf").read_bytes()
    at = data.index(b"q.weight") + len("q.weight") + 4
    (tmp_path / "x.gguf").write_bytes(data[:at] + struct.pack("<Q", 31) + data[at + 8 :])
    with pytest.raises(CheckpointError, match=r"tensor q\.weight has shape \[2, 31\]; rows of Q8_0 .* blocks of 32"):
        open_gguf(tmp_path / "x.gguf")


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    data = small_file(tmp_path / "x.gguf").read_bytes()
    at = data.index(b"q.weight") + len("q.weight") + 4 + 16
    (tmp_path / "x.gguf").write_bytes(data[:at] + struct.pack("<I", 999) + data[at + 4 :])
    with pytest.raises(UnsupportedModelError, match=r"x\.gguf: tensor q\.weight is stored in type 999"):
        open_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("old", "new", "what"), [(b"a.flags", b"a.words", "key a.words"), (b"q.weight", b"m.weight", "tensor m.weight")]
)
def test_names_given_twice_are_refused(old: bytes, new: bytes, what: str, whole: Path, tmp_path: Path) -> None:
    file = damaged(whole, tmp_path / "x.gguf", lambda data: data.replace(old, new))
    with pytest.raises(CheckpointError, match=f"{what} is given twice"):
        open_gguf(file)
