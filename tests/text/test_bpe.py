"""Claims about the teaching BPE: right where the sketch people copy is wrong, and equal to the real one."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers

from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.text.bpe import NUM_BYTES, BPETrainer, BPEVocabulary, build_bpe_vocab, train_bpe
from mini_vllm.text.bpe_files import byte_alphabet, save_bpe, to_tokenizers
from mini_vllm.text.byte_level import QWEN2_PATTERN
from mini_vllm.text.detokenizer import IncrementalDetokenizer
from mini_vllm.text.tokenizer import Tokenizer
from tests.text.corpus import corpus, texts

few_letters = st.text("abc", max_size=60) | st.text("ab", max_size=60) | st.text("a", max_size=40)


def count_without_overlap(ids: list[int], pair: tuple[int, int]) -> int:
    total = at = 0
    while at < len(ids) - 1:
        found = (ids[at], ids[at + 1]) == pair
        total += found
        at += 2 if found else 1
    return total


def merged(ids: list[int], pair: tuple[int, int], union: int) -> list[int]:
    out: list[int] = []
    at = 0
    while at < len(ids):
        if at + 1 < len(ids) and (ids[at], ids[at + 1]) == pair:
            out.append(union)
            at += 2
        else:
            out.append(ids[at])
            at += 1
    return out


def by_hand(text: str, vocab_size: int) -> tuple[list[bytes], list[tuple[int, int]], list[int]]:
    """The definition, word for word: count every pair, merge the best everywhere, begin again."""
    tokens = [bytes([value]) for value in range(256)]
    ids, merges, counts = list(text.encode()), [], []
    while len(tokens) < vocab_size and len(ids) > 1:
        pairs = {pair: count_without_overlap(ids, pair) for pair in pairwise(ids)}
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        union = tokens[best[0]] + tokens[best[1]]
        if union not in tokens:
            tokens.append(union)
        if best not in merges:
            merges.append(best)
            counts.append(pairs[best])
        ids = merged(ids, best, tokens.index(union))
    return tokens, merges, counts


def test_the_textbook_example_step_by_step() -> None:
    vocab, merges = build_bpe_vocab("aaabdaaabac", 259)
    a, b = ord("a"), ord("b")
    assert merges == {(a, a): 256, (a, b): 257, (256, 257): 258}
    assert [vocab[i] for i in (256, 257, 258)] == [b"aa", b"ab", b"aaab"]
    once = train_bpe(["aaabdaaabac"], 257, pattern=None)
    assert [once.tokens[i] for i in once.encode("aaabdaaabac")] == [
        b"aa",
        b"a",
        b"b",
        b"d",
        b"aa",
        b"a",
        b"b",
        b"a",
        b"c",
    ]


def test_the_sketch_that_never_applies_the_merge_learns_one_pair_for_ever() -> None:
    """Broken control: the loop as it is often copied."""
    ids, merges = list(b"aaabdaaabac"), {}
    for new_id in range(256, 259):
        pair, _ = Counter(pairwise(ids)).most_common(1)[0]
        merges[pair] = new_id
    assert list(merges) == [(97, 97)] and len(build_bpe_vocab("aaabdaaabac", 259)[1]) == 3


def test_runs_are_counted_as_often_as_they_can_be_merged() -> None:
    """'aaaa' holds 'aa' twice; counted with overlap it would hold it three times and beat 'bc', which stands there
    three times as well and first."""
    vocabulary = train_bpe(["bcbcbc" + "d" + "aaaa"], 257, pattern=None)
    assert vocabulary.tokens[256] == b"bc" and vocabulary.counts == (3,)
    with_overlap = Counter(pairwise(b"bcbcbcdaaaa"))
    assert with_overlap[(97, 97)] == 3, "broken control: the other count makes a tie, which 'aa' would win"


@given(few_letters, st.integers(256, 290))
def test_incremental_training_equals_counting_anew_each_time(text: str, vocab_size: int) -> None:
    vocabulary = train_bpe([text], vocab_size, pattern=None)
    tokens, merges, counts = by_hand(text, vocab_size)
    assert list(vocabulary.tokens) == tokens
    assert list(vocabulary.merges) == merges and list(vocabulary.counts) == counts


@given(st.lists(few_letters | texts(), max_size=5))
def test_the_trainers_books_balance_after_each_merge(words: list[str]) -> None:
    trainer = BPETrainer({word.encode(): 1 + index for index, word in enumerate(dict.fromkeys(words))})
    for _ in range(12):
        if not trainer.step():
            break
        chain = trainer._chain
        real: Counter[tuple[int, int]] = Counter()
        for at in range(len(chain.symbols)):
            if chain.after[at] != -1:
                real[chain.pair_at(at)] += chain.weights[at]
        assert +trainer._adjacent == real


def test_work_grows_with_the_places_merged_not_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: places visited in 300 merges of a text, and of one twice as long."""
    visited = []
    original = BPETrainer._merge_at
    monkeypatch.setattr(
        BPETrainer, "_merge_at", lambda self, at, union: visited.append(at) or original(self, at, union)
    )
    text = " ".join(corpus())
    work = []
    for repeats in (1, 2):
        visited.clear()
        train_bpe([text * repeats], 556, pattern=None)
        work.append(len(visited))
    assert work[0] < len(text.encode()), "each merge makes the text shorter by one symbol"
    assert work[1] < 2.1 * work[0]


# -- against the real one ---------------------------------------------------------------------------------------------


def real_training(lines: list[str], size: int) -> list[tuple[str, str]]:
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    import json

    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def counts_of(words: Counter[str], merges: list[tuple[str, str]]) -> list[int]:
    """How often each merge's pair stands in the words when its turn comes."""
    split = {word: list(word) for word in words}
    counts = []
    for left, right in merges:
        total = 0
        for word, parts in split.items():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == (left, right):
                    parts[at : at + 2] = [left + right]
                    total += words[word]
                at += 1
        counts.append(total)
    return counts


@pytest.mark.parametrize("part", range(4))
def test_each_merge_is_as_frequent_as_the_real_trainers(part: int) -> None:
    """Merges themselves may differ among equally frequent pairs. Runs of three equal letters are left out: the real
    trainer counts those with overlap."""
    import re

    lines = [re.sub(r"(.)\1\1+", r"\1\1", text, flags=re.DOTALL) for text in corpus()[part * 40 : part * 40 + 40]]
    vocabulary = train_bpe(lines, 330)
    real = real_training(lines, 330)
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(word for line in lines for word, _ in pre.pre_tokenize_str(line))
    ours = list(vocabulary.counts)
    theirs = counts_of(words, real)
    assert len(ours) == len(theirs) > 40
    assert ours[0] == theirs[0]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.9 * len(ours), "a tie broken the other way may shift a count by little"
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.03)


@pytest.mark.parametrize("pattern", [train_bpe.__kwdefaults__["pattern"], QWEN2_PATTERN, None])
def test_saved_files_give_the_same_ids_everywhere(tmp_path: Path, pattern: str | None) -> None:
    vocabulary = train_bpe(corpus(), 700, pattern=pattern, special_tokens=["<|endoftext|>", "<|im_start|>"])
    files = {path.name for path in save_bpe(vocabulary, tmp_path)}
    assert files == {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    rust, ours = RustTokenizer.from_file(str(tmp_path / "tokenizer.json")), Tokenizer.from_folder(tmp_path)
    assert len(vocabulary) == len(ours) == rust.get_vocab_size() == 700
    for text in corpus():
        ids = vocabulary.encode(text)
        assert ids == rust.encode(text).ids == ours.encode(text), text
        assert vocabulary.decode(ids) == text


@pytest.fixture(scope="module")
def learned() -> tuple[BPEVocabulary, RustTokenizer]:
    vocabulary = train_bpe(corpus(), 600, special_tokens=["<s>", "<s>>"])
    return vocabulary, to_tokenizers(vocabulary)


@given(text=texts("<s>", "<s>>"))
def test_any_text_has_the_same_ids_in_both_and_comes_back(text: str, learned) -> None:
    vocabulary, rust = learned
    ids = vocabulary.encode(text)
    assert ids == rust.encode(text).ids
    assert vocabulary.decode(ids) == text
    stream = IncrementalDetokenizer(Tokenizer(rust), (), False)
    assert "".join(stream.update([i]) for i in ids) + stream.flush() == text


@given(st.lists(st.integers(0, 599), max_size=40))
def test_any_ids_decode_alike(ids: list[int]) -> None:
    vocabulary = train_bpe(["abc " * 20], 260)
    ids = [i % len(vocabulary) for i in ids]
    assert vocabulary.decode(ids) == to_tokenizers(vocabulary).decode(ids, skip_special_tokens=False)


def test_vocab_json_and_merges_txt_alone_are_the_same_tokenizer(tmp_path: Path) -> None:
    vocabulary = train_bpe(corpus(), 600, special_tokens=["<|endoftext|>"])
    save_bpe(vocabulary, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    ours = Tokenizer.from_folder(tmp_path)
    for text in corpus():
        assert ours.encode(text) == vocabulary.encode(text)


def test_bytes_are_spelt_as_gpt2_spells_them() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert [byte_alphabet()[b] for b in b" \n\x00\xff\xadA"] == ["Ġ", "Ċ", "Ā", "ÿ", "Ń", "A"]


def test_training_is_deterministic_and_special_tokens_are_no_text() -> None:
    lines = ["b a<x><x>a b", "a b"] * 3
    first, second = (train_bpe(lines, 300, special_tokens=["<x>"]) for _ in range(2))
    assert first == second
    assert not any(b"<" in token or b">" in token for token in first.tokens[NUM_BYTES:])
    assert any(b"><" in token for token in train_bpe(lines, 300).tokens[NUM_BYTES:]), "broken control"
    assert first.special_tokens == {"<x>": len(first) - 1}


def test_training_stops_when_nothing_is_left_to_merge() -> None:
    assert len(train_bpe(["ab"], 1000)) == 257 and len(train_bpe([], 1000)) == 256
    assert train_bpe([], 1000).encode("") == []


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(InvalidParameterError, match="vocab_size: must be at least 257"):
        train_bpe(["a"], 256, special_tokens=["<s>"])
    with pytest.raises(InvalidParameterError, match="special_tokens: must be distinct"):
        train_bpe(["a"], 300, special_tokens=["<s>", "<s>"])
    with pytest.raises(InvalidParameterError, match="special_tokens: must be distinct and not empty"):
        train_bpe(["a"], 300, special_tokens=[""])
    with pytest.raises(InvalidParameterError, match="pattern: is no regular expression"):
        train_bpe(["a"], 300, pattern="(")
    with pytest.raises(InvalidParameterError, match="ids: must be below 256"):
        train_bpe(["a"], 300).decode([5, 256])


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mini_vllm.entrypoints.cli.main import main

    text = tmp_path / "corpus.txt"
    text.write_bytes("\r\n".join(corpus()).encode())
    command = ["train-bpe", str(text), "--vocab-size", "400", "--output", str(tmp_path / "out")]
    assert main([*command, "--special-token", "<e>", "--show-merges", "2"]) == 0
    assert "400 tokens, 143 merges: tokenizer.json" in capsys.readouterr().out
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    assert tokenizer.encode("x<e>")[-1] == 399 and tokenizer.decode(tokenizer.encode("naïve\r\n")) == "naïve\r\n"
    assert main(command) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert main([*command, "--force", "--pattern", "none"]) == 0
    assert main(["train-bpe", str(tmp_path / "none"), "--vocab-size", "400", "--output", str(tmp_path / "o2")]) == 2
    assert "files: cannot read" in capsys.readouterr().err
    assert main(["train-bpe", str(text), "--vocab-size", "9", "--output", str(tmp_path / "o2")]) == 2
    assert "vocab_size: must be at least 256" in capsys.readouterr().err
