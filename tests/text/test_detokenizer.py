"""Claims about incremental detokenisation, mostly as properties over random ids and random Unicode."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.engine.arg_utils import DEFAULT_MODEL
from mini_vllm.text.detokenizer import IncrementalDetokenizer
from mini_vllm.text.tokenizer import Tokenizer
from tests.text.test_tokenizer import make_sentencepiece_like

BYTE_LEVEL = Tokenizer.from_folder(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("spm")
    return Tokenizer.from_folder(make_sentencepiece_like(folder, add_bos_token=None, post_processor=True))


def run(tokenizer: Tokenizer, ids: Sequence[int], *, prompt: Sequence[int] = (), skip: bool = True) -> list[str]:
    """What `update` returned for each id, then what `flush` did."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    pieces = [*(detokenizer.update([token_id]) for token_id in ids), detokenizer.flush()]
    assert detokenizer.text == "".join(pieces)
    return pieces


ids_of_2048 = st.lists(st.integers(0, 2047), max_size=80)
byte_ids = st.lists(st.sampled_from([BYTE_LEVEL.convert_tokens_to_ids(c) for c in "ĠĢģâĤ¬ð٤aÂé"]), max_size=120)


@given(ids_of_2048 | byte_ids.map(lambda ids: [i for i in ids if i is not None]), st.booleans())
def test_pieces_add_up_to_the_full_decoding_for_any_ids(ids: list[int], skip: bool) -> None:
    assert "".join(run(BYTE_LEVEL, ids, skip=skip)) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=60))
def test_no_piece_of_valid_text_holds_half_a_character(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    pieces = run(BYTE_LEVEL, ids, skip=False)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_decoding_each_id_alone_does_show_half_characters() -> None:
    """Broken control of the two above."""
    ids = BYTE_LEVEL.encode("東京🙂", add_special_tokens=False)
    assert "\ufffd" in "".join(BYTE_LEVEL.decode([token_id]) for token_id in ids)
    assert "".join(run(BYTE_LEVEL, ids)) == "東京🙂"


@given(ids_of_2048, st.integers(1, 7))
def test_how_ids_are_grouped_does_not_change_the_text(ids: list[int], size: int) -> None:
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    grouped = "".join(detokenizer.update(ids[i : i + size]) for i in range(0, len(ids), size)) + detokenizer.flush()
    assert grouped == BYTE_LEVEL.decode(ids)


def test_an_unfinished_character_is_held_until_it_is_whole() -> None:
    ids = BYTE_LEVEL.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1, "the test needs a character of several tokens"
    pieces = run(BYTE_LEVEL, ids)
    assert pieces[:-2] == [""] * (len(ids) - 1) and pieces[-2:] == ["🙂", ""]


def test_what_is_cut_off_in_mid_character_ends_in_a_replacement_character() -> None:
    ids = BYTE_LEVEL.encode("ok 🙂", add_special_tokens=False)[:-1]
    assert "".join(run(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)
    assert run(BYTE_LEVEL, ids)[-1] == "\ufffd"


def test_endless_broken_bytes_are_released_and_held_ids_stay_few() -> None:
    broken = BYTE_LEVEL.convert_tokens_to_ids("Ģ")  # byte 0x80, never the start of a character
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    released = [detokenizer.update([broken]) for _ in range(2000)]
    assert sum(map(len, released)) > 1900
    assert len(detokenizer._window) <= 64
    assert detokenizer.text + detokenizer.flush() == BYTE_LEVEL.decode([broken] * 2000)


def test_special_tokens_are_skipped_or_shown_as_asked() -> None:
    end = BYTE_LEVEL.eos_token_id
    ids = [*BYTE_LEVEL.encode("a", add_special_tokens=False), end, *BYTE_LEVEL.encode("b", add_special_tokens=False)]
    assert "".join(run(BYTE_LEVEL, ids)) == "ab"
    assert "".join(run(BYTE_LEVEL, ids, skip=False)) == "a<|endoftext|>b"


# -- tokenizers that decode the first token differently ----------------------------------------------------------------


def test_the_first_token_keeps_its_space_after_a_prompt(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the cat sat on the mat", add_special_tokens=False)
    prompt, output = ids[:3], ids[3:]
    text = sentencepiece.decode(prompt) + "".join(run(sentencepiece, output, prompt=prompt))
    assert text == "the cat sat on the mat"
    assert "".join(run(sentencepiece, output)) == sentencepiece.decode(output), "without a prompt it is the plain text"


@given(data=st.data())
def test_byte_fallback_adds_up_for_valid_text_and_survives_any_bytes(
    data: st.DataObject, sentencepiece: Tokenizer
) -> None:
    text = data.draw(st.text(max_size=30))
    ids = sentencepiece.encode(text, add_special_tokens=False)
    assert "".join(run(sentencepiece, ids, skip=False)) == sentencepiece.decode(ids, skip_special_tokens=False)
    wild = data.draw(st.lists(st.integers(3, sentencepiece.vocab_size - 1), max_size=60))
    shown = ""
    for piece in run(sentencepiece, wild):
        shown += piece  # never raises, never takes anything back
    assert len(shown) <= len(sentencepiece.decode(wild, skip_special_tokens=False)) + len(wild)


@given(ids_of_2048, st.integers(0, 30))
def test_leaving_the_rust_stream_at_any_point_changes_no_piece(ids: list[int], at: int) -> None:
    """The two ways to decode are one algorithm: the window alone gives what the stream gives."""
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    pieces = []
    for position, token_id in enumerate(ids):
        if position == at:
            detokenizer._window = detokenizer._window or [0]  # as after text, so that there is a prefix to decode
            detokenizer._stream = None
            held = detokenizer._held
            detokenizer._prefix = detokenizer._text_of(detokenizer._window[: len(detokenizer._window) - held])
        pieces.append(detokenizer.update([token_id]))
    assert pieces == run(BYTE_LEVEL, ids)[:-1]
