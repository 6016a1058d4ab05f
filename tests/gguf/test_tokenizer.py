"""Claims about tokenizers out of GGUF files: the ids of the same tokenizer as tokenizer.json, on text of every kind."""

import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from gguf import TokenType
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, trainers

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.gguf.pre_tokenizers import SPLITTINGS
from mini_vllm.gguf.reader import open_gguf
from mini_vllm.gguf.tokenizer import SPACE, gguf_tokenizer
from mini_vllm.text.tokenizer import Tokenizer
from tests.checkpoints import write_tokenizer
from tests.gguf.writer import add_bpe_tokenizer, finish

SAMPLES = [
    "", " ", "  two  spaces ", "\n\n\ttabs\r\nand lines\n \n", "hello world, goodbye", "I'LL we'll IT'S don't",
    "1 12 123 1234 12345 3.14 ½ ² Ⅷ ١٢٣", "def f(x):\n    return x**2  # naïve café\n", "東京 привет עברית हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🇫🇷", "e\u0301 \u00e9 \u1e9b\u0323", "<s></s> <|im_start|>user\n<|im_end|>", "a" * 70,
    "\x00\x01\u200d\ufeff\u3000",
    "aaa aaaa aaaaa \u2581\u2581x",
]  # fmt: skip
RANGES = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x900, 0x97F), (0x3040, 0x30FF),
          (0x4E00, 0x4FFF), (0xAC00, 0xACFF), (0x2000, 0x206F), (0x1F300, 0x1F64F), (0x0, 0x1F)]  # fmt: skip


def corpus(count: int = 300) -> list[str]:
    rng = random.Random(5)
    words = "the request counter hello world paging memory don't 2024 naïve café def return".split()

    def piece() -> str:
        if rng.random() < 0.5:
            return rng.choice(words)
        low, high = rng.choice(RANGES)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))

    texts = [
        "".join(piece() + rng.choice(["", " ", "  ", "\n", " \n", ", "]) for _ in range(rng.randint(1, 12)))
        for _ in range(count)
    ]
    return SAMPLES + texts


def tokenizer_of(path: Path, fill: Callable[[gguf.GGUFWriter], None]) -> Tokenizer:
    writer = gguf.GGUFWriter(path / "x.gguf", "llama")
    fill(writer)
    finish(writer)
    return gguf_tokenizer(open_gguf(path / "x.gguf"))


# --- byte-level BPE ---------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, request.param)
    return tmp_path


def test_byte_level_ids_are_those_of_tokenizer_json(folder: Path) -> None:
    ours = tokenizer_of(folder, lambda writer: add_bpe_tokenizer(writer, folder, padded_to=448))
    theirs = Tokenizer.from_folder(folder)
    texts = corpus()
    for special in (True, False):
        assert ours.encode_batch(texts, special) == theirs.encode_batch(texts, special)
    assert [ours.decode(ids) for ids in ours.encode_batch(texts)] == texts_without_special_tokens(theirs, texts)


def texts_without_special_tokens(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    return [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)]


def test_everything_beside_the_ids_is_the_same_too(folder: Path) -> None:
    ours = tokenizer_of(folder, lambda writer: add_bpe_tokenizer(writer, folder, padded_to=448))
    theirs = Tokenizer.from_folder(folder)
    assert ours.get_vocab() == theirs.get_vocab()  # the padding is no token
    assert ours.special_tokens == theirs.special_tokens and ours.all_special_ids == theirs.all_special_ids
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat, add_generation_prompt=True) == theirs.apply_chat_template(
        chat, add_generation_prompt=True
    )


def trained(pattern: str) -> RustTokenizer:
    """A byte-level BPE that splits text by `pattern`."""
    from tokenizers import Regex, decoders, pre_tokenizers

    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=1, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus(400), trainer)
    return tokenizer


def fill_from(tokenizer: RustTokenizer, pre: str) -> Callable[[gguf.GGUFWriter], None]:
    model = json.loads(tokenizer.to_str())["model"]

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(sorted(model["vocab"], key=model["vocab"].__getitem__))
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])

    return fill


def test_gpt_2_words_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    ours = tokenizer_of(tmp_path, fill_from(base := trained(r"\S+|\s+"), "gpt-2"))
    model = json.loads(base.to_str())["model"]
    theirs = GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    assert_same_ids(ours, theirs)


def test_qwen_2_words_and_normal_form_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    ours = tokenizer_of(tmp_path, fill_from(base := trained(r"\S+|\s+"), "qwen2"))
    model = json.loads(base.to_str())["model"]
    theirs = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    assert_same_ids(ours, theirs)
    assert ours.encode("e\u0301") == ours.encode("\u00e9")


def assert_same_ids(ours: Tokenizer, theirs: object) -> None:
    known = set(ours.get_vocab().values())
    for text in corpus():
        ids = theirs.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
        if set(ids) <= known:  # the class adds special tokens of its own
            assert ours.encode(text, add_special_tokens=False) == ids, text


def test_llama_3_words_take_three_digits_and_whole_tokens(tmp_path: Path) -> None:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    theirs = trained(pattern)
    ours = tokenizer_of(tmp_path, fill_from(theirs, "llama-bpe"))
    for text in corpus():
        assert ours.encode(text) == theirs.encode(text).ids, text
    assert [token for token, _ in ours.backend.pre_tokenizer.pre_tokenize_str("12345")] == ["123", "45"]


def test_another_pre_tokenizer_gives_other_ids(tmp_path: Path) -> None:
    """Broken control: the name in the file does matter."""
    base = trained(r"\S+|\s+")
    encoded = set()
    for pre in ("gpt-2", "llama-bpe", "qwen2", "starcoder"):
        (tmp_path / pre).mkdir()
        ours = tokenizer_of(tmp_path / pre, fill_from(base, pre))
        encoded.add(str(ours.encode_batch(corpus())))
    assert len(encoded) == 4


def test_every_listed_pattern_splits_without_losing_a_character() -> None:
    from tokenizers import decoders

    for splitting in SPLITTINGS.values():
        for text in corpus(50):
            words = [word for word, _ in splitting.pre_tokenizer().pre_tokenize_str(text)]
            assert decoders.ByteLevel().decode(words) == text


@pytest.mark.parametrize(("pre", "told"), [("no-such-words", "'no-such-words'"), (None, "names no pre-tokenizer")])
def test_an_unknown_pre_tokenizer_is_told_once_and_taken_as_gpt_2(
    pre: str | None, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mini_vllm"), "propagate", True)
    base = trained(r"\S+|\s+")

    def fill(writer: gguf.GGUFWriter) -> None:
        fill_from(base, pre or "gpt-2")(writer)
        if pre is None:
            for shard in writer.kv_data:
                shard.pop("tokenizer.ggml.pre")

    ours = tokenizer_of(tmp_path, fill)
    assert caplog.text.count(told) == 1 and "x.gguf" in caplog.text
    (tmp_path / "2").mkdir()
    assert ours.encode("it's 123") == tokenizer_of(tmp_path / "2", fill_from(base, "gpt-2")).encode("it's 123")


# --- SentencePiece BPE ------------------------------------------------------------------------------------


def sentencepiece_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and kinds in the order of a Llama 2 vocabulary: control, bytes, merged pieces, characters."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trainer = trainers.BpeTrainer(vocab_size=600, min_frequency=1, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(corpus(40) + ["the cat sat on the mat and the dog sat on the cat"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merged = ["".join(merge) for merge in model["merges"]]
    characters = [token for token in model["vocab"] if len(token) == 1]
    pieces = list(dict.fromkeys([*merged, *characters]))
    scores = [-float(rank) for rank in range(len(pieces))]
    special = ["<unk>", "<s>", "</s>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    return (
        [*special, *byte_pieces, *pieces, "<mine>"],
        [0.0] * 259 + scores + [-1000.0],
        [int(kind) for kind in kinds] + [int(TokenType.NORMAL)] * len(pieces) + [int(TokenType.USER_DEFINED)],
    )


VOCABULARY = sentencepiece_vocabulary()


def fill_sentencepiece(writer: gguf.GGUFWriter) -> None:
    tokens, scores, kinds = VOCABULARY
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def join_by_score(text: str) -> list[int]:
    """SentencePiece's rule itself: join the neighbours whose union scores highest, the leftmost of equals."""
    tokens, scores, kinds = VOCABULARY
    score = {t: s for t, s, kind in zip(tokens, scores, kinds, strict=True) if kind == TokenType.NORMAL}
    ids = {token: index for index, token in enumerate(tokens)}
    parts = list((SPACE + text.replace(" ", SPACE)) if text else "")
    while True:
        options = [(score[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
        if not options:
            break
        at = -max(options)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        index
        for part in parts
        for index in ([ids[part]] if part in score else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]


def test_sentencepiece_ids_are_those_of_joining_by_score(tmp_path: Path) -> None:
    ours = tokenizer_of(tmp_path, fill_sentencepiece)
    for text in corpus():
        if not any(token in text for token in ("<s>", "</s>", "<unk>", "<mine>")):
            assert ours.encode(text, add_special_tokens=False) == join_by_score(text), text


def test_sentencepiece_ids_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    tokens, scores, kinds = VOCABULARY
    pieces = {t: s for t, s, kind in zip(tokens, scores, kinds, strict=True) if kind == TokenType.NORMAL}
    ids = {token: index for index, token in enumerate(tokens)}
    merges = generate_merges({token: ids[token] for token in pieces}, pieces)
    theirs = LlamaTokenizer(vocab=ids, merges=merges, legacy=True)
    ours = tokenizer_of(tmp_path, fill_sentencepiece)
    for text in corpus():
        if "<" not in text and not text.startswith((" ", SPACE)):  # where this class puts no second space before it
            expected = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text, add_special_tokens=False) == expected, text


def test_scores_decide_what_is_joined(tmp_path: Path) -> None:
    """Broken control of the three above: with the scores of other pieces, ids differ."""
    ours = tokenizer_of(tmp_path, fill_sentencepiece)

    def shuffled(writer: gguf.GGUFWriter) -> None:
        fill_sentencepiece(writer)
        writer.kv_data[0].pop("tokenizer.ggml.scores")
        writer.add_token_scores(VOCABULARY[1][::-1])

    (tmp_path / "other").mkdir()
    other = tokenizer_of(tmp_path / "other", shuffled)
    assert ours.encode_batch(corpus()) != other.encode_batch(corpus())


def test_sentencepiece_text_survives_the_round_trip(tmp_path: Path) -> None:
    ours = tokenizer_of(tmp_path, fill_sentencepiece)
    for text in corpus():
        if "<" not in text and SPACE not in text:
            assert ours.decode(ours.encode(text)) == text


def test_kinds_of_tokens_say_how_they_are_matched(tmp_path: Path) -> None:
    ours = tokenizer_of(tmp_path, fill_sentencepiece)
    mine = ours.convert_tokens_to_ids("<mine>")
    assert ours.all_special_ids == [0, 1, 2]
    assert mine in ours.encode("a<mine>b") and "<mine>" in ours.decode([mine])
    assert ours.encode("<s>", add_special_tokens=False) == [1] and ours.decode([1, 2]) == ""
    assert ours.encode("<0x41>", add_special_tokens=False) != [3 + 0x41]  # bytes are no text


# --- frame and templates ----------------------------------------------------------------------------------


def test_bos_is_added_by_default_for_sentencepiece_and_not_when_the_file_says_no(tmp_path: Path) -> None:
    def without(writer: gguf.GGUFWriter) -> None:
        fill_sentencepiece(writer)
        writer.add_add_bos_token(False)

    (tmp_path / "no").mkdir()
    assert tokenizer_of(tmp_path, fill_sentencepiece).encode("the")[0] == 1
    assert tokenizer_of(tmp_path / "no", without).encode("the")[0] != 1


def test_eos_is_added_when_the_file_says_so(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        fill_sentencepiece(writer)
        writer.add_add_eos_token(True)

    ids = tokenizer_of(tmp_path, fill).encode("the")
    assert ids[0] == 1 and ids[-1] == 2 and ids.count(1) == 1


def test_no_space_is_put_before_a_text_when_the_file_says_no(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        fill_sentencepiece(writer)
        writer.add_add_space_prefix(False)

    ours = tokenizer_of(tmp_path, fill)
    assert ours.decode(ours.encode("the cat")) == "the cat" and ours.decode(ours.encode(" the")) == " the"
    assert ours.convert_ids_to_tokens(ours.encode("the"))[1][0] != SPACE


def test_named_chat_templates_are_kept(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        fill_sentencepiece(writer)
        writer.add_chat_template([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}])

    assert tokenizer_of(tmp_path, fill).chat_templates == {"default": "D", "tool_use": "T"}


# --- what is refused --------------------------------------------------------------------------------------


def change_sentencepiece(**changes: Callable[[gguf.GGUFWriter], None]) -> Callable[[gguf.GGUFWriter], None]:
    def fill(writer: gguf.GGUFWriter) -> None:
        fill_sentencepiece(writer)
        for key, add in changes.items():
            writer.kv_data[0].pop(f"tokenizer.ggml.{key}", None)
            add(writer)

    return fill


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (change_sentencepiece(bos_token_id=lambda w: w.add_bos_token_id(9999)), "bos_token_id = 9999 is outside"),
        (change_sentencepiece(scores=lambda w: w.add_token_scores([0.5])), "scores has 1 entries"),
        (change_sentencepiece(scores=lambda w: None), "scores is missing"),
        (change_sentencepiece(token_type=lambda w: w.add_token_types([1])), "token_type has 1 entries"),
        (change_sentencepiece(tokens=lambda w: None), "tokens is missing"),
        (
            change_sentencepiece(tokens=lambda w: w.add_array("tokenizer.ggml.tokens", [1, 2])),
            "tokens must be an array",
        ),
        (change_sentencepiece(model=lambda w: w.add_tokenizer_model("gpt2")), "merges is missing"),
    ],
    ids=["bos", "short-scores", "no-scores", "short-types", "no-tokens", "no-strings", "no-merges"],
)
def test_a_damaged_vocabulary_names_file_and_key(
    fill: Callable[[gguf.GGUFWriter], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(
        CheckpointError, match=rf"x\.gguf: tokenizer\.ggml\.{message}" if "one" not in message else message
    ):
        tokenizer_of(tmp_path, fill)


@pytest.mark.parametrize("merge", ["nospace", "zzz qqq"])
def test_merges_of_what_is_no_token_are_refused(merge: str, tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        fill_from(trained(r"\S+"), "gpt-2")(writer)
        writer.kv_data[0].pop("tokenizer.ggml.merges")
        writer.add_token_merges([merge])

    with pytest.raises(CheckpointError, match=r"x\.gguf: tokenizer\.ggml\.(merges|tokens)"):
        tokenizer_of(tmp_path, fill)


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", None])
def test_other_kinds_of_tokenizers_are_refused_with_a_way_out(kind: str | None, tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        if kind is not None:
            writer.add_tokenizer_model(kind)

    with pytest.raises(UnsupportedModelError, match=r"x\.gguf: tokenizer\.ggml\.model.*--tokenizer DIR"):
        tokenizer_of(tmp_path, fill)


# --- published vocabularies -------------------------------------------------------------------------------

VOCABULARIES = ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "command-r", "starcoder", "refact", "mpt"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vocabularies with texts and their ids, from the source distribution of llama-cpp-python.

    `MINI_VLLM_TEST_VOCABULARIES` may name a folder that has them already.
    """
    given = os.environ.get("MINI_VLLM_TEST_VOCABULARIES")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("vocabularies")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    done = subprocess.run([*command, "llama-cpp-python", "-d", folder], capture_output=True, timeout=300, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        pytest.skip("the source distribution of llama-cpp-python cannot be downloaded here")
    with tarfile.open(archives[0]) as archive:
        members = [m for m in archive.getmembers() if "/models/ggml-vocab-" in m.name and m.isfile()]
        for member in members:
            source = archive.extractfile(member)
            assert source is not None
            with (folder / Path(member.name).name).open("wb") as target:
                shutil.copyfileobj(source, target)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_published_vocabularies_give_their_published_ids(name: str, published: Path) -> None:
    file = published / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{file}.out").read_text(encoding="utf-8").split("\n")
    expected = [[int(item) for item in line.split()] for line in lines]
    tokenizer = gguf_tokenizer(open_gguf(file))
    assert len(texts) > 40
    assert [tokenizer.encode(text, add_special_tokens=False) for text in texts] == expected[: len(texts)]
