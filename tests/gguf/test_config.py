"""Claims about a GGUF file's metadata as the model's configuration."""

import logging
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.exceptions import CheckpointError, MiniVLLMError, UnsupportedModelError
from mini_vllm.gguf.config import config_dict, gguf_hf_config
from mini_vllm.gguf.families import FAMILIES
from mini_vllm.gguf.reader import open_gguf
from mini_vllm.gguf.tokenizer import gguf_tokenizer
from mini_vllm.hf_config import HFConfig
from tests.checkpoints import make_checkpoint
from tests.gguf.writer import load_arrays, matrices_as, write_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", seed=1)


def with_metadata(llama: Path, tmp_path: Path, change: Callable[[gguf.GGUFWriter], None]) -> Path:
    return write_gguf(llama, tmp_path / "x.gguf", change=change)


def setting(key: str, value: object) -> Callable[[gguf.GGUFWriter], None]:
    """Set, or with None remove, a key."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            kinds[type(value)](key, value)

    return change


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_config_is_the_one_the_file_was_made_from(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "model", family, seed=2, head_dim=32, num_kv_heads=1, tie_word_embeddings=True, rope_theta=5e5,
        vocab_size=400,
    )  # fmt: skip
    ours = gguf_hf_config(open_gguf(write_gguf(folder, tmp_path / "x.gguf")))
    theirs = HFConfig.from_folder(folder)
    for key in HFConfig.__dataclass_fields__:
        if key != "raw":
            assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Type.F32, "float32"), (Type.F16, "float16"), (Type.BF16, "bfloat16"), (Type.Q8_0, None), (Type.Q4_0, None)],
)
def test_the_dtype_is_what_most_numbers_are_stored_in(kind: Type, dtype: str, llama: Path, tmp_path: Path) -> None:
    file = open_gguf(write_gguf(llama, tmp_path / "x.gguf", matrices_as(kind)))
    assert gguf_hf_config(file).dtype == dtype


def test_every_token_that_ends_a_turn_ends_a_sequence(llama: Path, tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(7)
        writer.add_eom_token_id(9)

    assert config_dict(open_gguf(with_metadata(llama, tmp_path, change)))["eos_token_id"] == [2, 7, 9]


def test_files_that_name_no_end_of_turn_have_it_found_by_its_text(llama: Path, tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        kinds = writer.kv_data[0]["tokenizer.ggml.token_type"].value
        tokens[5], kinds[5] = "<|eot_id|>", int(gguf.TokenType.CONTROL)
        tokens[6] = "<|im_end|>"  # an ordinary token that looks like one

    assert config_dict(open_gguf(with_metadata(llama, tmp_path, change)))["eos_token_id"] == [2, 5]


@pytest.mark.parametrize("value", [[2, 2], [4, 4]])
def test_numbers_given_per_layer_count_if_they_are_the_same(value: list[int], llama: Path, tmp_path: Path) -> None:
    file = open_gguf(with_metadata(llama, tmp_path, setting("llama.attention.head_count_kv", value)))
    assert config_dict(file)["num_key_value_heads"] == value[0]


def test_a_window_makes_a_llama_file_a_mistral(llama: Path, tmp_path: Path) -> None:
    config = config_dict(open_gguf(with_metadata(llama, tmp_path, setting("llama.attention.sliding_window", 32))))
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] == 32


def test_an_old_spelling_of_linear_scaling_is_read(llama: Path, tmp_path: Path) -> None:
    config = config_dict(open_gguf(with_metadata(llama, tmp_path, setting("llama.rope.scale_linear", 2.0))))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_what_has_no_meaning_here_is_told(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mini_vllm"), "propagate", True)
    config_dict(open_gguf(with_metadata(llama, tmp_path, setting("llama.new_thing", 3))))
    assert "x.gguf: metadata that has no meaning here: llama.new_thing" in caplog.text


def test_a_plain_file_is_read_without_a_warning(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mini_vllm"), "propagate", True)
    gguf_hf_config(open_gguf(write_gguf(llama, tmp_path / "x.gguf")))
    assert not caplog.records


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("llama.embedding_length", None, CheckpointError, "is missing"),
        ("llama.block_count", "two", CheckpointError, "must be an integer"),
        ("llama.block_count", 0, CheckpointError, "at least 1"),
        ("llama.attention.head_count", True, CheckpointError, "must be an integer"),
        ("llama.rope.freq_base", "high", CheckpointError, "must be a number"),
        ("llama.attention.layer_norm_rms_epsilon", None, CheckpointError, "is missing"),
        ("llama.attention.head_count_kv", [2, 4], UnsupportedModelError, "differs from layer to layer"),
        ("llama.attention.value_length", 8, UnsupportedModelError, "differs from the key length 16"),
        ("llama.expert_count", 8, UnsupportedModelError, "= 8 is not supported"),
        ("llama.rope.scaling.type", "new", UnsupportedModelError, "'new' is not supported"),
        ("tokenizer.ggml.eos_token_id", 4000, CheckpointError, "outside the 384 tokens"),
    ],
)
def test_bad_metadata_names_file_and_key(
    key: str, value: object, error: type[Exception], message: str, llama: Path, tmp_path: Path
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        setting(key, value)(writer)
        if key == "llama.rope.scaling.type":
            writer.add_rope_scaling_factor(2.0)

    file = open_gguf(with_metadata(llama, tmp_path, change))
    with pytest.raises(error, match=rf"x\.gguf: .*{key.rpartition('.')[2]}.*{message}|x\.gguf: .*layer_norm.*missing"):
        config_dict(file)


def test_a_yarn_factor_that_writers_differ_on_is_refused(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    folder = make_checkpoint(tmp_path / "model", "llama", rope_scaling=scaling)
    file = with_metadata(folder, tmp_path, setting("llama.rope.scaling.attn_factor", 1.5))
    with pytest.raises(UnsupportedModelError, match=r"attn_factor = 1\.5"):
        config_dict(open_gguf(file))


def test_values_that_config_json_would_refuse_are_refused_naming_the_file(llama: Path, tmp_path: Path) -> None:
    file = open_gguf(with_metadata(llama, tmp_path, setting("llama.attention.head_count_kv", 3)))
    with pytest.raises(CheckpointError, match=r"x\.gguf: .*num_key_value_heads"):
        gguf_hf_config(file)


@pytest.mark.parametrize("architecture", ["mamba", None])
def test_other_architectures_are_refused_with_the_list(architecture: str | None, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture or "x")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture")
    writer.add_tensor("t", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = "supported are " + ", ".join(sorted(FAMILIES)) if architecture else "general.architecture must be"
    with pytest.raises(CheckpointError, match=rf"x\.gguf: .*{expected}"):
        gguf_hf_config(open_gguf(tmp_path / "x.gguf"))


@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes_are_never_an_untyped_error(llama: Path, changes: list[tuple[int, int]]) -> None:
    file = llama / "whole.gguf"
    if not file.is_file():
        write_gguf(llama, file)
    data = bytearray(file.read_bytes())
    head = data.index(b"blk.0.attn_q.weight") + 60  # metadata and the first of the tensors' descriptions
    for offset, value in changes:
        data[offset % head] = value
    damaged = llama / "damaged.gguf"
    damaged.write_bytes(data)
    try:
        opened = open_gguf(damaged)
        gguf_hf_config(opened)
        gguf_tokenizer(opened).encode("hello world")
    except MiniVLLMError:
        pass


def test_a_file_with_a_vocabulary_alone_is_no_model(llama: Path, tmp_path: Path) -> None:
    drop = tuple(load_arrays(llama))
    file = open_gguf(write_gguf(llama, tmp_path / "x.gguf", drop=drop))
    assert gguf_tokenizer(file).vocab_size == 384
    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor token_embd\.weight is missing"):
        gguf_hf_config(file)
