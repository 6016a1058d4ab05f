"""Claims about `vocab.json` + `merges.txt`: ids equal transformers', broken files are named."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.text.detokenizer import IncrementalDetokenizer
from mini_vllm.text.tokenizer import Tokenizer
from tests.text.corpus import corpus, texts
from tests.text.gpt2_files import LAYOUTS, SPECIALS, write_layout


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, object]]:
    """Of each layout: ours, and transformers' reading of the same folder."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("byte_level")
    folders = {name: write_layout(root / name, name) for name in LAYOUTS}
    return {name: (Tokenizer.from_folder(path), AutoTokenizer.from_pretrained(path)) for name, path in folders.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_equal_those_of_transformers_on_the_corpus(pairs, name: str) -> None:
    ours, theirs = pairs[name]
    for text in corpus():
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special), (
                text
            )


@given(data=st.data())
def test_ids_equal_those_of_transformers_on_any_text(data: st.DataObject, pairs) -> None:
    name = data.draw(st.sampled_from(sorted(LAYOUTS)))
    ours, theirs = pairs[name]
    text = data.draw(texts(*SPECIALS))
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@given(data=st.data())
def test_text_comes_back_and_streams_as_it_decodes(data: st.DataObject, pairs) -> None:
    ours, _ = pairs["gpt2"]
    text = data.draw(texts())
    ids = ours.encode(text, add_special_tokens=False)
    assert ours.decode(ids, skip_special_tokens=False) == text
    stream = IncrementalDetokenizer(ours, (), False)
    assert "".join(stream.update([i]) for i in ids) + stream.flush() == text


def test_families_do_split_differently(pairs) -> None:
    """Broken control: with GPT-2's pattern, Qwen2's digits would stay together."""
    text = "12345 we'LL\n\n"
    words = {name: [w for w, _ in pairs[name][0].backend.pre_tokenizer.pre_tokenize_str(text)] for name in LAYOUTS}
    assert words["qwen2"] != words["gpt2"]


def test_special_tokens_follow_from_the_family_where_no_file_names_them(pairs) -> None:
    gpt2, opt, qwen2 = (pairs[name][0] for name in ("gpt2", "opt", "qwen2"))
    assert (gpt2.bos_token, gpt2.eos_token) == ("<|endoftext|>",) * 2
    assert gpt2.decode([gpt2.eos_token_id]) == ""
    assert (opt.bos_token, opt.eos_token, opt.special_tokens["pad_token"]) == ("</s>", "</s>", "<pad>")
    assert (qwen2.bos_token, qwen2.eos_token) == (None, "<|im_end|>")


def test_opt_begins_each_text_with_its_end_token_and_gpt2_does_not(pairs) -> None:
    gpt2, opt = pairs["gpt2"][0], pairs["opt"][0]
    assert opt.encode("hello")[0] == opt.eos_token_id == 2
    assert opt.encode("hello").count(2) == 1 and opt.encode("hello", add_special_tokens=False).count(2) == 0
    assert gpt2.encode("hello") == gpt2.encode("hello", add_special_tokens=False)
    assert opt.encode_batch(["a", "b c"]) == [opt.encode("a"), opt.encode("b c")]


def test_opt_is_known_by_its_model_type_alone(tmp_path: Path) -> None:
    write_layout(tmp_path, "opt")
    expected = Tokenizer.from_folder(tmp_path).encode("hello")
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(tmp_path).encode("hello") == expected


def test_a_class_whose_splitting_is_unknown_is_refused_with_the_list_of_those_known(tmp_path: Path) -> None:
    write_layout(tmp_path, "gpt2")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(UnsupportedModelError, match=r"CLIPTokenizer.*known are GPT2Tokenizer, .*Qwen2Tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_merges_may_be_longer_than_the_vocabulary_is_wide_but_hold_no_strangers(tmp_path: Path) -> None:
    write_layout(tmp_path, "gpt2")
    merges = tmp_path / "merges.txt"
    good = merges.read_text(encoding="utf-8")
    lines = good.count("\n")
    for bad, problem in (
        ("a", "must be two tokens and one space"),
        ("a b c", "must be two tokens and one space"),
        (" a", "must be two tokens and one space"),
        ("a zzzz", "'zzzz' is no token"),
        ("Z Q", "'ZQ' is no token"),
    ):
        merges.write_text(good + bad + "\n", encoding="utf-8")
        with pytest.raises(CheckpointError, match=rf"merges\.txt, line {lines + 1}: .*{problem}"):
            Tokenizer.from_folder(tmp_path)
    merges.write_bytes(good.encode().replace(b"\n", b"\r\n"))
    assert len(Tokenizer.from_folder(tmp_path)) == len(json.loads((tmp_path / "vocab.json").read_text()))
    merges.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"merges\.txt: is not UTF-8"):
        Tokenizer.from_folder(tmp_path)


def test_the_same_merge_many_times_is_only_work(tmp_path: Path) -> None:
    write_layout(tmp_path, "gpt2")
    expected = Tokenizer.from_folder(tmp_path).encode("hello hello")
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges + merges.split("\n")[-2] + "\n" * 1 + "\n" * 1000, encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).encode("hello hello") == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not readable JSON"),
        ("[]", "must hold an object of tokens"),
        ("{}", "must hold an object of tokens"),
        ('{"a": "0"}', "the id of 'a' must be from 0"),
        ('{"a": -1}', "the id of 'a' must be from 0"),
        ('{"a": true}', "the id of 'a' must be from 0"),
        ('{"a": 1e3}', "the id of 'a' must be from 0"),
        ('{"a": 99999999999}', "the id of 'a' must be from 0"),
        ('{"a": 1, "b": 1}', "'a' and 'b' both have id 1"),
        ("[" * 100_000, "not readable JSON"),
    ],
)
def test_a_broken_vocabulary_is_named(tmp_path: Path, content: str, problem: str) -> None:
    write_layout(tmp_path, "gpt2")
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"vocab\.json: .*" + problem):
        Tokenizer.from_folder(tmp_path)


def test_declared_ids_may_leave_holes_but_not_collide(tmp_path: Path) -> None:
    write_layout(tmp_path, "qwen2")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    size = Tokenizer.from_folder(tmp_path).vocab_size
    config["added_tokens_decoder"][str(size + 5)] = {"content": "<far>", "special": True}
    path.write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<far>b")[1] == size + 5 and tokenizer.vocab_size == size + 6
    config["added_tokens_decoder"]["3"] = {"content": "<three>", "special": True}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"vocab\.json: '<three>' is declared as id 3, but .*id 3 is '"):
        Tokenizer.from_folder(tmp_path)
