"""Claims about special and added tokens: every layout of files, every flag, against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.exceptions import CheckpointError
from mini_vllm.text.tokenizer import Tokenizer
from tests.checkpoints import write_tokenizer
from tests.text import spm
from tests.text.corpus import texts
from tests.text.gpt2_files import write_layout

FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
WORDS = ("<a>", "<b>", "<c>", "word", "NEW", "ﬁx")


def oracle(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in {**value, **changes}.items() if v is not ...}))


def decoder_of(size: int, flags: list[dict[str, bool]]) -> dict[str, Any]:
    return {str(size + i): {"content": WORDS[i], **one} for i, one in enumerate(flags)}


@given(data=st.data())
def test_flags_act_as_in_transformers(data: st.DataObject, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("flags")
    size = Tokenizer.from_folder(write_layout(folder, "gpt2")).vocab_size
    one = st.fixed_dictionaries({flag: st.booleans() for flag in FLAGS})
    flags = data.draw(st.lists(one, min_size=1, max_size=len(WORDS)))
    edit(
        folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", added_tokens_decoder=decoder_of(size, flags)
    )
    ours, theirs = Tokenizer.from_folder(folder), oracle(folder)
    for text in data.draw(st.lists(texts(*WORDS, "sword", " word ", "  <a>  "), max_size=6)):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_each_flag_changes_ids(tmp_path: Path) -> None:
    """Broken control of the above: without the flag, other ids."""
    size = Tokenizer.from_folder(write_layout(tmp_path, "gpt2")).vocab_size
    text = {"lstrip": "x  <a>y", "rstrip": "x<a>  y", "single_word": "x<a>y"}
    for flag, sample in text.items():
        found = []
        for value in (True, False):
            declared = {str(size): {"content": "<a>", "special": True, flag: value}}
            edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=declared)
            found.append(Tokenizer.from_folder(tmp_path).encode(sample))
        assert found[0] != found[1], flag


@given(data=st.data())
def test_stripping_flags_act_on_sentencepiece_models_too(data: st.DataObject, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("flags_spm")
    one = st.fixed_dictionaries({flag: st.booleans() for flag in ("lstrip", "rstrip", "single_word")})
    flags = [{**f, "special": True, "normalized": False} for f in data.draw(st.lists(one, min_size=1, max_size=4))]
    config = {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_prefix_space": False,
        "bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": decoder_of(700, flags),
    }  # fmt: skip
    spm.write_folder(folder, "llama", config)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = Tokenizer.from_folder(folder), oracle(folder)
    for text in data.draw(st.lists(texts(*WORDS, "  <a>  ", "x<b>"), max_size=6)):
        assert ours.encode(text) == theirs.encode(text)


def test_the_older_files_declare_the_same(tmp_path: Path) -> None:
    """added_tokens.json gives ids, special_tokens_map.json says which are special and under which name."""
    folder = write_layout(tmp_path, "gpt2")
    size = Tokenizer.from_folder(folder).vocab_size
    edit(folder / "added_tokens.json", **{"<tool>": size + 1, "<pad>": size, "plain": size + 2})
    edit(
        folder / "special_tokens_map.json",
        pad_token={"content": "<pad>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False},
        extra_special_tokens=["<tool>"],
    )
    ours, theirs = Tokenizer.from_folder(folder), oracle(folder)
    for text in ("a <pad>b", "x<tool>y plain z", "<tool> <pad>plain"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens["pad_token"] == "<pad>" and ours.pad_token_id == size
    assert {size, size + 1} <= set(ours.all_special_ids) and size + 2 not in ours.all_special_ids


def test_added_tokens_decoder_makes_the_older_files_silent(tmp_path: Path) -> None:
    folder = write_layout(tmp_path, "qwen2")
    edit(folder / "added_tokens.json", **{"<old>": 10_000})
    assert Tokenizer.from_folder(folder).convert_tokens_to_ids("<old>") is None


def test_a_special_token_without_id_takes_the_next_one(tmp_path: Path) -> None:
    folder = write_layout(tmp_path, "gpt2")
    size = Tokenizer.from_folder(folder).vocab_size
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", pad_token="[PAD]")
    ours, theirs = Tokenizer.from_folder(folder), oracle(folder)
    assert ours.pad_token_id == theirs.pad_token_id == size
    assert ours.encode("a[PAD]b") == theirs.encode("a[PAD]b")


@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_a_text_is_framed_as_the_config_says(tmp_path: Path, kind: str, bos: bool | None, eos: bool | None) -> None:
    if kind == "json":
        write_tokenizer(tmp_path, "llama")  # whose post-processor adds BOS
    else:
        spm.write_folder(tmp_path, "llama", {"bos_token": "<s>", "eos_token": "</s>"})
    changes = {"add_bos_token": bos, "add_eos_token": eos}
    edit(tmp_path / "tokenizer_config.json", **{k: ... if v is None else v for k, v in changes.items()})
    ours = Tokenizer.from_folder(tmp_path)
    bare = ours.encode("hello", add_special_tokens=False)
    if kind == "sentencepiece":
        assert ours.encode("hello") == [*([1] if bos is not False else []), *bare, *([2] if eos else [])]
    else:
        assert ours.encode("hello") == [1, *bare], "a complete file decides itself"
        assert ours.encode("hello") == oracle(tmp_path).encode("hello")


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder must be an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "must have an id from 0"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "a"}}}', "must have an id from 0"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}', "'1'] has no content"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": 5}}}', "must be a token"),
        ("special_tokens_map.json", '{"eos_token": ["a"]}', "eos_token must be a token"),
        ("special_tokens_map.json", '{"additional_special_tokens": "a"}', "additional_special_tokens must be a list"),
        ("added_tokens.json", '{"a": 1e99}', "'a' must have an id from 0"),
        ("added_tokens.json", '{"a": 99999999999}', "'a' must have an id from 0"),
        ("added_tokens.json", '{"a": 7777, "b": 7777}', "'b' and 'a' both have id 7777"),
        ("added_tokens.json", "[]", "must hold a JSON object"),
    ],
)
def test_a_broken_declaration_is_named_with_its_file(tmp_path: Path, file: str, content: str, problem: str) -> None:
    import re

    write_layout(tmp_path, "gpt2")
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(file) + ".*" + re.escape(problem)):
        Tokenizer.from_folder(tmp_path)
