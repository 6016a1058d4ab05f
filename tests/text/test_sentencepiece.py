"""Claims about SentencePiece models: ids equal the library's, and transformers' where those two agree."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.text.detokenizer import IncrementalDetokenizer
from mini_vllm.text.sentencepiece import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_sentencepiece
from mini_vllm.text.sentencepiece_normalizer import PrecompiledCharsmap
from mini_vllm.text.tokenizer import Tokenizer
from tests.text import spm
from tests.text.corpus import corpus, texts

pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Of each kind: ours, and the library's own."""
    root = tmp_path_factory.mktemp("spm")
    return {
        kind: (Tokenizer.from_folder(spm.write_folder(root / kind, kind)), spm.processor(kind)) for kind in spm.KINDS
    }


def specials(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids]


def plain(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the text is without special tokens, which the library does not read in a text."""
    return not any(token in text for token in specials(tokenizer))


@pytest.mark.parametrize("kind", spm.KINDS)
def test_ids_equal_the_librarys_on_the_corpus(tokenizers, kind: str) -> None:
    ours, theirs = tokenizers[kind]
    compared = [text for text in corpus() if plain(ours, text)]
    assert len(compared) > 600
    for text in compared:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text), text


@given(data=st.data())
def test_ids_equal_the_librarys_on_any_text(data: st.DataObject, tokenizers) -> None:
    kind = data.draw(st.sampled_from(sorted(spm.KINDS)))
    ours, theirs = tokenizers[kind]
    text = data.draw(texts("<sep>", "[X]", "▁", "▁▁▁", "<table>", "<0x0A>"))
    if plain(ours, text):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)


def test_the_rust_normalisers_alone_would_give_other_ids(tokenizers) -> None:
    """Broken control: the pipeline that conversions to tokenizer.json use, on the same corpus."""
    ours, theirs = tokenizers["t5"]
    model = read_sentencepiece(Path(ours.name_or_path) / "tokenizer.model")
    rust = normalizers.Precompiled(model.precompiled_charsmap)
    table = PrecompiledCharsmap(model.precompiled_charsmap)
    differing = [text for text in corpus() if rust.normalize_str(text) != table.replace(text)]
    assert differing
    converted = type(ours.backend).from_str(ours.backend.to_str())
    converted.normalizer = rust
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    plain_texts = [text for text in corpus() if plain(ours, text)]
    assert any(converted.encode(t, add_special_tokens=False).ids != theirs.encode(t) for t in plain_texts)


@pytest.mark.parametrize("kind", spm.KINDS)
def test_decoding_gives_what_the_library_gives(tokenizers, kind: str) -> None:
    ours, theirs = tokenizers[kind]
    unknown = theirs.unk_id()
    for text in corpus():
        ids = theirs.encode(text)
        if unknown not in ids and plain(ours, text) and not text.startswith("▁"):
            assert ours.decode(ids) == theirs.decode(ids), text


@given(data=st.data())
def test_text_comes_back_where_the_model_loses_nothing(data: st.DataObject, tokenizers) -> None:
    kind = data.draw(st.sampled_from(["llama", "gemma", "unigram-bytes"]))
    ours, _ = tokenizers[kind]
    text = data.draw(texts()).replace("▁", "_")
    if plain(ours, text):
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", spm.KINDS)
@given(data=st.data())
def test_streamed_pieces_add_up(data: st.DataObject, tokenizers, kind: str) -> None:
    ours, _ = tokenizers[kind]
    ids = ours.encode(data.draw(texts()), add_special_tokens=False)
    stream = IncrementalDetokenizer(ours, (), False)
    pieces = [stream.update([i]) for i in ids] + [stream.flush()]
    assert "".join(pieces) == ours.decode(ids, skip_special_tokens=False)


def test_kinds_of_pieces_become_kinds_of_tokens(tokenizers) -> None:
    gemma, _ = tokenizers["gemma"]
    assert (gemma.bos_token_id, gemma.eos_token_id, gemma.pad_token_id) == (2, 1, 0)
    turn = gemma.convert_tokens_to_ids("<turn>")
    table = gemma.convert_tokens_to_ids("<table>")
    assert turn in gemma.all_special_ids and table not in gemma.all_special_ids
    assert gemma.encode("a<turn>b<table>", add_special_tokens=False)[1::2] == [turn, table]
    assert gemma.decode([turn, table]) == "<table>"


def test_bos_is_added_by_default_where_the_model_is_one_that_generates(tokenizers) -> None:
    for kind, first, last in (("llama", [1], []), ("gemma", [2], []), ("unigram-bytes", [], [])):
        ours, _ = tokenizers[kind]
        bare = ours.encode("hello", add_special_tokens=False)
        assert ours.encode("hello") == [*first, *bare, *last]


# -- against transformers ---------------------------------------------------------------------------------------------

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "first": ("llama", {**LLAMA, "legacy": False, "add_bos_token": True, "add_eos_token": False}),
    "every": ("llama", {**LLAMA, "legacy": True, "add_bos_token": True, "add_eos_token": True}),
    "unsaid": ("llama", {**LLAMA, "add_bos_token": False}),
    "no-prefix": ("llama", {**LLAMA, "add_prefix_space": False, "add_bos_token": True}),
    "gemma": ("gemma", {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                        "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<turn>", "add_bos_token": True}),
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("converted")
    pairs = {}
    for name, (kind, config) in CONFIGS.items():
        folder = spm.write_folder(root / name, kind, config)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        pairs[name] = (Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder))
    return pairs


def both_read_it_alike(name: str, text: str) -> bool:
    """transformers leaves out the space that SentencePiece puts before a text which begins with one, and takes
    symbols spelt with visible spaces (Gemma's "▁▁") where those are written in the text only."""
    if name == "gemma":
        return "▁" not in text
    return name == "no-prefix" or not (text.startswith((" ", "▁")) or "> " in text or ">▁" in text)


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_equal_those_of_transformers_on_the_corpus(converted, name: str) -> None:
    ours, theirs = converted[name]
    compared = [text for text in corpus() if both_read_it_alike(name, text)]
    assert len(compared) > 600
    for text in compared:
        assert ours.encode(text) == theirs.encode(text), text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@given(data=st.data())
def test_ids_equal_those_of_transformers_with_special_tokens_in_the_text(data: st.DataObject, converted) -> None:
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    ours, theirs = converted[name]
    text = data.draw(texts("<s>", "</s>", "<unk>", "</s><s>[INST]", "<pad>"))
    if both_read_it_alike(name, text):
        assert ours.encode(text) == theirs.encode(text)


def test_where_the_two_differ_the_library_is_followed(converted) -> None:
    ours, theirs = converted["unsaid"]
    sentencepiece = spm.processor("llama")
    assert ours.encode("  two spaces") == sentencepiece.encode("  two spaces")
    assert theirs.encode("  two spaces") != sentencepiece.encode("  two spaces")


# -- what a list of merges can say ------------------------------------------------------------------------------------


def bpe_model(pieces: list[tuple[str, float, int]]) -> Any:
    model = pb.ModelProto()
    model.trainer_spec.model_type = 2
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    for text, score, kind in [("<unk>", 0.0, 2), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), *pieces]:
        model.pieces.add(piece=text, score=score, type=kind)
    return model


@given(data=st.data())
def test_any_scores_that_differ_give_the_librarys_ids(data: st.DataObject, tmp_path_factory) -> None:
    """Two letters only, so that pieces overlap in every way."""
    sentencepiece = pytest.importorskip("sentencepiece")
    unions = data.draw(st.lists(st.text("ab▁", min_size=2, max_size=6), unique=True, max_size=14))
    pieces = [(text, -float(rank), NORMAL) for rank, text in enumerate([*unions, "a", "b", "▁"])]
    folder = tmp_path_factory.mktemp("ab")
    (folder / "tokenizer.model").write_bytes(bpe_model(pieces).SerializeToString())
    ours = Tokenizer.from_folder(folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in data.draw(st.lists(st.text("ab ", max_size=40), max_size=8)):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)


def test_equal_scores_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pieces = [("ab", -1.0, NORMAL), ("ba", -1.0, NORMAL), ("a", -2.0, NORMAL), ("b", -3.0, NORMAL)]
    (tmp_path / "tokenizer.model").write_bytes(bpe_model(pieces).SerializeToString())
    with caplog.at_level("WARNING", logger="mini_vllm"):
        import logging

        logging.getLogger("mini_vllm").addHandler(caplog.handler)
        Tokenizer.from_folder(tmp_path)
        logging.getLogger("mini_vllm").removeHandler(caplog.handler)
    assert "share a score" in caplog.text


# -- reading the file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", spm.KINDS)
def test_the_reader_finds_what_protobuf_finds(tmp_path: Path, kind: str) -> None:
    ours = read_sentencepiece(spm.write_folder(tmp_path, kind) / "tokenizer.model")
    theirs = pb.ModelProto.FromString(spm.model_bytes(kind))
    assert [(p.text, p.score, p.kind) for p in ours.pieces] == [(p.piece, p.score, p.type) for p in theirs.pieces]
    trainer, normalizer = theirs.trainer_spec, theirs.normalizer_spec
    assert (ours.model_type, ours.byte_fallback) == (trainer.model_type, trainer.byte_fallback)
    assert ours.whitespace_as_suffix == trainer.treat_whitespace_as_suffix
    assert (ours.unk_id, ours.bos_id, ours.eos_id) == (trainer.unk_id, trainer.bos_id, trainer.eos_id)
    assert ours.pad_id == trainer.pad_id, "-1 is ten bytes"
    assert ours.precompiled_charsmap == normalizer.precompiled_charsmap
    assert ours.add_dummy_prefix == normalizer.add_dummy_prefix
    assert ours.remove_extra_whitespaces == normalizer.remove_extra_whitespaces
    assert ours.escape_whitespaces == normalizer.escape_whitespaces


def test_the_replacement_table_equals_the_librarys(tokenizers) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    for kind in ("t5", "bpe-nfkc_cf"):
        model = pb.ModelProto.FromString(spm.model_bytes(kind))
        table = PrecompiledCharsmap(model.normalizer_spec.precompiled_charsmap)
        normalizer = sentencepiece.SentencePieceNormalizer(
            rule_name=model.normalizer_spec.name, add_dummy_prefix=False, escape_whitespaces=False,
            remove_extra_whitespaces=False,
        )  # fmt: skip
        for text in (*corpus(), *("".join(map(chr, range(n, n + 64))) for n in range(0, 0xD800, 64))):
            assert table.replace(text) == normalizer.normalize(text), repr(text)


@given(data=st.data())
def test_a_file_cut_short_or_altered_is_read_or_refused_with_its_name(data: st.DataObject, tmp_path_factory) -> None:
    raw = bytearray(spm.model_bytes("llama"))
    path = tmp_path_factory.mktemp("broken") / "tokenizer.model"
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    try:
        tokenizer = Tokenizer.from_folder(path)
    except CheckpointError as error:
        assert "tokenizer" in str(error)
    else:
        tokenizer.encode("hello  world \x00é")


def rewrite(path: Path, change: Any) -> Path:
    model = pb.ModelProto.FromString(spm.model_bytes("llama"))
    change(model)
    path.write_bytes(model.SerializePartialToString())
    return path


def set_piece(index: int, **fields: Any) -> Any:
    def change(model: Any) -> None:
        for name, value in fields.items():
            setattr(model.pieces[index], name, value)

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_piece(300, piece=""), r"pieces\[300\]\.piece is empty"),
        (set_piece(300, piece="<s>"), r"pieces\[300\]\.piece repeats pieces\[1\]: '<s>'"),
        (set_piece(300, score=float("nan")), r"pieces\[300\]\.score of .* is nan"),
        (set_piece(300, type=2), r"pieces must have exactly one of type UNKNOWN, have 2"),
        (set_piece(20, piece="x1y2"), r"byte_fallback is set, but pieces has no <0x"),
        (lambda m: m.ClearField("pieces"), "it has no pieces"),
        (lambda m: setattr(m.trainer_spec, "model_type", 4), "model_type = 4 .* is not supported"),
        (lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True), "treat_whitespace_as_suffix"),
        (lambda m: setattr(m.denormalizer_spec, "precompiled_charsmap", b"x"), "denormalizer_spec"),
        (set_piece(300, piece="a" * 2000), "has 2000 characters"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused_naming_the_field(tmp_path: Path, change: Any, problem: str) -> None:
    path = rewrite(tmp_path / "tokenizer.model", change)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: .*" + problem):
        Tokenizer.from_folder(tmp_path)
    assert Tokenizer.from_folder(rewrite(path, lambda m: None)).vocab_size == 700


def test_unused_pieces_are_refused_only_where_they_could_matter(tmp_path: Path) -> None:
    pieces = [("ab", -1.0, NORMAL), ("a", -2.0, NORMAL), ("b", -3.0, NORMAL), ("zz", -4.0, UNUSED)]
    (tmp_path / "tokenizer.model").write_bytes(bpe_model(pieces).SerializeToString())
    assert Tokenizer.from_folder(tmp_path).encode("abab", add_special_tokens=False) == [3, 3]
    pieces[0] = ("ab", -1.0, UNUSED)
    (tmp_path / "tokenizer.model").write_bytes(bpe_model(pieces).SerializeToString())
    with pytest.raises(UnsupportedModelError, match="UNUSED"):
        Tokenizer.from_folder(tmp_path)


def test_a_hostile_replacement_table_reads_nothing_outside_itself() -> None:
    for data in (
        b"",
        b"\x01",
        b"\xff\xff\xff\xff",
        b"\x04\0\0\0" + b"\xff" * 4,
        b"\x10\0\0\0" + b"\0\4\0\0" * 4 + b"abc",
    ):
        assert isinstance(PrecompiledCharsmap(data).replace("aé\x00" * 10), str)
    endless = b"\0\1\0\0" + b"".join((97 | 0x100 | (0 << 10)).to_bytes(4, "little") for _ in range(256))
    PrecompiledCharsmap(endless).replace("a" * 20_000)  # each look-up is bounded: this takes no time


def test_a_tiktoken_file_of_the_same_name_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is a tiktoken vocabulary"):
        Tokenizer.from_folder(tmp_path)


def test_a_placeholder_piece_takes_the_text_the_config_gives_it(tmp_path: Path) -> None:
    spm.write_folder(tmp_path, "gemma", {"added_tokens_decoder": {"4": {"content": "<fim>", "special": True}}})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<fim>", add_special_tokens=False)[-1] == 4
    assert tokenizer.convert_ids_to_tokens(4) == "<fim>" and len(tokenizer) == spm.processor("gemma").get_piece_size()


def test_tokens_beyond_the_model_keep_their_ids_even_over_a_hole(tmp_path: Path) -> None:
    spm.write_folder(tmp_path, "llama", {"added_tokens_decoder": {"705": {"content": "<far>", "special": True}}})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<far>", add_special_tokens=False)[-1] == 705 and len(tokenizer) == 706
    spm.write_folder(tmp_path, "llama", {"added_tokens_decoder": {"705": {"content": "<s>", "special": True}}})
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: '<s>' is declared as id 705, but .* has id 1"):
        Tokenizer.from_folder(tmp_path)


def test_user_defined_symbols_are_not_special_even_at_the_start(tokenizers) -> None:
    ours, theirs = tokenizers["unigram-bytes"]
    assert USER_DEFINED in {p.kind for p in read_sentencepiece(Path(ours.name_or_path) / "tokenizer.model").pieces}
    assert ours.encode("<sep>a", add_special_tokens=False) == theirs.encode("<sep>a")
