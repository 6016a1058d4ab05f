"""Claims about stop strings, several samples and logprobs on the caller's side of the core. The core is played."""

from pathlib import Path
from typing import Any

import pytest

from mini_vllm.core.scheduler_output import EngineCoreOutput, PromptLogprobs, TokenLogprobs
from mini_vllm.engine.output_processor import OutputProcessor
from mini_vllm.outputs import CompletionOutput, Logprob, RequestOutput
from mini_vllm.request import Request
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams
from mini_vllm.text.tokenizer import Tokenizer
from tests.text.test_detokenizer import BYTE_LEVEL

DELTA, CUMULATIVE, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY
TEXT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"


@pytest.fixture
def tokenizer(llama: Path) -> Tokenizer:
    return Tokenizer.from_folder(llama)


class Player:
    """Plays the core for one request until it is told that a stop string ended it."""

    def __init__(self, tokenizer: Tokenizer | None, n: int = 1, **params: Any) -> None:
        self.processor = OutputProcessor(tokenizer)
        self.params = SamplingParams(n=n, max_tokens=1000, **params)
        children = [f"{index}_r" for index in range(1, n)]
        self.processor.add_request(Request("r", [1, 5], self.params, child_ids=children), "prompt")
        self.outputs: list[RequestOutput] = []
        self.stopped: list[str] = []

    def tell(self, *news: EngineCoreOutput) -> list[RequestOutput]:
        outputs = self.processor.process(news, 0.0)
        self.outputs += outputs
        self.stopped += self.processor.take_stopped()
        return outputs

    def run(self, ids: list[int], *, per_step: int = 1, finish: str | None = "length", **last: Any) -> CompletionOutput:
        """One step after another until the text or the ids end."""
        for start in range(0, len(ids), per_step):
            if self.stopped:
                break
            reason = finish if start + per_step >= len(ids) else None
            extra = last if reason else {}
            self.tell(EngineCoreOutput("r", ids[start : start + per_step], finish_reason=reason, **extra))
        return self.outputs[-1].outputs[0]


# -- stop strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_step", [1, 3, 100])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["return", "urn a", "\n\ndef", ")", "):\n    ret"])
def test_generation_ends_at_the_stop_string_wherever_tokens_begin(stop: str, include: bool, per_step: int) -> None:
    ids = BYTE_LEVEL.encode(TEXT)
    player = Player(BYTE_LEVEL, stop=[stop, "never"], include_stop_str_in_output=include, output_kind=FINAL_ONLY)
    end = player.run(ids, per_step=per_step)
    cut = TEXT.index(stop) + len(stop)
    assert end.text == (TEXT[:cut] if include else TEXT[: cut - len(stop)])
    assert (end.finish_reason, end.stop_reason) == ("stop", stop)
    shortest = next(n for n in range(len(ids) + 1) if stop in BYTE_LEVEL.decode(ids[:n]))
    assert end.token_ids == ids[:shortest], "the token that completes it is the last one reported"
    assert player.stopped == (["r"] if shortest < len(ids) and per_step < 100 else []) or per_step == 3
    assert not player.processor.has_unfinished_requests()


def test_a_stop_string_straddles_tokens() -> None:
    """What makes the test above one: looked for in each token alone, these stop strings are never found."""
    ids = BYTE_LEVEL.encode(TEXT)
    assert not any("urn a" in BYTE_LEVEL.decode([i]) or "):\n    ret" in BYTE_LEVEL.decode([i]) for i in ids)


def test_deltas_hold_back_what_might_be_a_stop_string_and_add_up() -> None:
    ids = BYTE_LEVEL.encode(TEXT)
    delta, cumulative = (Player(BYTE_LEVEL, stop="return b", output_kind=kind) for kind in (DELTA, CUMULATIVE))
    delta.run(ids)
    assert cumulative.run(ids).text == TEXT, "it never came, so all of it is shown in the end"
    texts = [output.outputs[0].text for output in delta.outputs]
    assert "".join(texts) == TEXT
    assert [output.outputs[0].text for output in cumulative.outputs] == [
        "".join(texts[: count + 1]) for count in range(len(texts))
    ]
    for count in range(len(texts)):
        assert not any("".join(texts[:count]).endswith("return b"[:n]) for n in range(1, 9)), "taken back later"


def test_a_stop_string_in_the_last_token_wins_over_the_length() -> None:
    ids = BYTE_LEVEL.encode("one two")
    player = Player(BYTE_LEVEL, stop="two")
    end = player.run(ids)
    assert (end.text, end.finish_reason, end.stop_reason, player.stopped) == ("one ", "stop", "two", [])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_shows_in_the_ids_and_only_if_asked_in_the_text(include: bool) -> None:
    ids = BYTE_LEVEL.encode("one two\n")
    player = Player(BYTE_LEVEL, stop="never", include_stop_str_in_output=include)
    end = player.run(ids, finish="stop", stop_reason=ids[-1])
    assert (end.token_ids, end.stop_reason, end.finish_reason) == (ids, ids[-1], "stop")
    assert end.text == BYTE_LEVEL.decode(ids if include else ids[:-1])


def test_stop_strings_do_not_count_among_the_first_min_tokens() -> None:
    ids = BYTE_LEVEL.encode("\n".join("abcdef"))
    newlines = [n for n, i in enumerate(ids, start=1) if BYTE_LEVEL.decode([i]) == "\n"]
    for min_tokens in (0, 1, newlines[0], newlines[1], newlines[1] + 1):
        end = Player(BYTE_LEVEL, stop="\n", min_tokens=min_tokens).run(ids)
        assert len(end.token_ids) == next(n for n in newlines if n > min_tokens)


def test_logprobs_end_with_the_token_that_completes_the_stop_string() -> None:
    ids = BYTE_LEVEL.encode(TEXT)
    items = [TokenLogprobs([i], [-0.5], 1) for i in ids]
    player = Player(BYTE_LEVEL, stop="return", logprobs=0)
    player.tell(EngineCoreOutput("r", ids, logprobs=items))
    end = player.outputs[-1].outputs[0]
    assert end.logprobs is not None and len(end.logprobs) == len(end.token_ids) < len(ids)
    assert end.cumulative_logprob == -0.5 * len(end.token_ids) and player.stopped == ["r"]
    assert player.tell(EngineCoreOutput("r", [7])) == [], "what the core says later is not for anybody"


def test_special_tokens_in_a_row_are_written_with_or_without_what_the_decoder_puts_between(
    tokenizer: Tokenizer,
) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from tokenizers.decoders import WordPiece

    backend = Backend(models.WordLevel({"a": 0, "b": 1, "[X]": 2}, unk_token="a"))
    backend.decoder = WordPiece()
    backend.add_special_tokens(["[X]"])
    words = Tokenizer(backend)
    texts = [
        Player(words, skip_special_tokens=False, spaces_between_special_tokens=spaces).run([0, 2, 2, 1]).text
        for spaces in (True, False)
    ]
    assert texts == [" a [X] [X] b", " a [X][X] b"]


# -- several samples ------------------------------------------------------------------------------------------------


def news(core_id: str, *ids: int, end: str | None = None, **kwargs: Any) -> EngineCoreOutput:
    return EngineCoreOutput(core_id, list(ids), finish_reason=end, **kwargs)


def shape(output: RequestOutput) -> list[tuple[int, list[int], str | None]]:
    return [(c.index, c.token_ids, c.finish_reason) for c in output.outputs]


def test_each_step_gives_one_output_with_every_index() -> None:
    player = Player(None, n=3)
    (output,) = player.tell(news("1_r", 11), news("2_r", 12), news("r", 10))
    assert shape(output) == [(0, [10], None), (1, [11], None), (2, [12], None)] and not output.finished
    (output,) = player.tell(news("r", 20, end="stop"), news("2_r", 22))
    assert shape(output) == [(0, [10, 20], "stop"), (1, [11], None), (2, [12, 22], None)] and not output.finished
    (output,) = player.tell(news("2_r", 32, end="length"), news("1_r", 21, end="length"))
    assert shape(output) == [(0, [10, 20], "stop"), (1, [11, 21], "length"), (2, [12, 22, 32], "length")]
    assert output.finished and output.request_id == "r" and not player.processor.has_unfinished_requests()


def test_deltas_hold_the_indices_that_have_news_in_order() -> None:
    player = Player(None, n=3, output_kind=DELTA)
    (first,) = player.tell(news("2_r", 12), news("1_r", 11), news("r", 10))
    (second,) = player.tell(news("1_r", 21, end="length"))
    (third,) = player.tell(news("2_r", 22, end="length"), news("r", 20, end="length"))
    assert [shape(o) for o in (first, second, third)] == [
        [(0, [10], None), (1, [11], None), (2, [12], None)],
        [(1, [21], "length")],
        [(0, [20], "length"), (2, [22], "length")],
    ]
    assert [o.finished for o in (first, second, third)] == [False, False, True]


def test_final_only_waits_for_the_last_sample() -> None:
    player = Player(None, n=2, output_kind=FINAL_ONLY)
    assert player.tell(news("1_r", 11, end="length"), news("r", 10)) == []
    (output,) = player.tell(news("r", 20, end="length"))
    assert shape(output) == [(0, [10, 20], "length"), (1, [11], "length")] and output.finished


def test_each_sample_meets_its_own_stop_string() -> None:
    a, b, stop = (BYTE_LEVEL.convert_tokens_to_ids(token) for token in "abĊ")
    player = Player(BYTE_LEVEL, n=2, stop="\n")
    player.tell(news("r", a), news("1_r", b))
    (output,) = player.tell(news("r", stop), news("1_r", b))
    assert player.stopped == ["r"] and [c.text for c in output.outputs] == ["a", "bb"]
    (output,) = player.tell(news("1_r", stop))
    assert player.stopped == ["r", "1_r"] and output.finished and [c.stop_reason for c in output.outputs] == ["\n"] * 2


def test_the_prompt_is_counted_once_and_every_token() -> None:
    player = Player(None, n=3)
    player.tell(news("1_r", 11, num_cached_tokens=1), news("2_r", 12), news("r", 10))
    player.tell(news("1_r", 11), news("2_r", 12))
    assert (player.processor.num_prompt_tokens, player.processor.num_generation_tokens) == (2, 5)
    assert player.outputs[-1].num_cached_tokens == 1


def test_an_abort_ends_every_sample_and_frees_every_id() -> None:
    player = Player(None, n=3)
    player.tell(news("1_r", 11, end="stop"), news("2_r", 12), news("r", 10))
    assert player.processor.core_ids(["r", "nobody"]) == ["r", "2_r"]
    assert all(core_id in player.processor for core_id in ("r", "2_r"))
    (output,) = player.processor.abort(["r"], 1.0)
    assert shape(output) == [(0, [10], "abort"), (1, [11], "stop"), (2, [12], "abort")] and output.finished
    assert not any(core_id in player.processor for core_id in ("r", "1_r", "2_r"))


def test_a_sample_that_fails_does_not_end_the_others() -> None:
    player = Player(None, n=2)
    (output,) = player.tell(news("1_r", end="error", error="no luck"), news("r", 10))
    assert (output.error, output.finished) == ("no luck", False)
    (output,) = player.tell(news("r", 20, end="length"))
    assert output.finished and [c.finish_reason for c in output.outputs] == ["length", "error"]


# -- logprobs -------------------------------------------------------------------------------------------------------


def item(*pairs: tuple[int, float], rank: int) -> TokenLogprobs:
    return TokenLogprobs([i for i, _ in pairs], [value for _, value in pairs], rank)


def test_the_sampled_token_comes_first_with_its_rank(tokenizer: Tokenizer) -> None:
    player = Player(tokenizer, logprobs=2)
    player.tell(news("r", 30, logprobs=[item((30, -4.0), (20, -0.5), (10, -1.0), rank=7)]))
    player.tell(news("r", 20, end="length", logprobs=[item((20, -0.25), (20, -0.25), (10, -1.0), rank=1)]))
    end = player.outputs[-1].outputs[0]
    assert end.logprobs == [
        {
            30: Logprob(-4.0, 7, tokenizer.decode([30])),
            20: Logprob(-0.5, 1, tokenizer.decode([20])),
            10: Logprob(-1.0, 2, tokenizer.decode([10])),
        },
        {20: Logprob(-0.25, 1, tokenizer.decode([20])), 10: Logprob(-1.0, 2, tokenizer.decode([10]))},
    ]
    assert [list(position) for position in end.logprobs] == [[30, 20, 10], [20, 10]]
    assert end.cumulative_logprob == -4.25


def test_deltas_hold_the_logprobs_of_their_own_tokens() -> None:
    player = Player(None, logprobs=0, output_kind=DELTA)
    for token_id, end in ((5, None), (6, None), (7, "length")):
        player.tell(news("r", token_id, end=end, logprobs=[item((token_id, -1.0), rank=1)]))
    ends = [output.outputs[0] for output in player.outputs]
    assert [list(c.logprobs[0]) for c in ends if c.logprobs] == [[5], [6], [7]]
    assert [c.cumulative_logprob for c in ends] == [-1.0, -2.0, -3.0], "of all so far"


def test_tokens_asked_for_by_id_have_no_rank_of_their_own() -> None:
    player = Player(None, logprobs=1, logprob_token_ids=[9, 20])
    player.tell(news("r", 30, logprobs=[item((30, -4.0), (20, -0.5), (9, -6.0), (20, -0.5), rank=7)]))
    (position,) = player.outputs[-1].outputs[0].logprobs or ()
    assert position == {30: Logprob(-4.0, 7), 20: Logprob(-0.5, 1), 9: Logprob(-6.0, None)}


def test_without_detokenisation_there_is_no_text_in_logprobs(tokenizer: Tokenizer) -> None:
    player = Player(tokenizer, logprobs=0, detokenize=False)
    player.tell(news("r", 30, logprobs=[item((30, -4.0), rank=7)]))
    assert player.outputs[-1].outputs[0].logprobs == [{30: Logprob(-4.0, 7, None)}]


def prompt_chunk(start: int, *ids: int) -> PromptLogprobs:
    return PromptLogprobs(start, [item((i, -float(i)), (1, -0.1), rank=i) for i in ids])


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_prompt_logprobs_are_put_together_from_chunks_and_given_once(kind: RequestOutputKind) -> None:
    """The second chunk was lost to a preemption, so the prompt is computed again from its beginning."""
    processor = OutputProcessor(None)
    request = Request("r", [5, 6, 7, 8, 9], SamplingParams(prompt_logprobs=1, output_kind=kind))
    processor.add_request(request, None)
    chunks = [prompt_chunk(1, 6), prompt_chunk(1, 6, 7), prompt_chunk(3, 8)]
    assert processor.process([EngineCoreOutput("r", prompt_logprobs=chunk) for chunk in chunks], 0.0) == []
    outputs = processor.process([news("r", 10, prompt_logprobs=prompt_chunk(4, 9))], 0.0)
    outputs += processor.process([news("r", 11, end="length", prompt_logprobs=prompt_chunk(1, 6, 7, 8, 9))], 0.0)
    expected = [None, *({i: Logprob(-float(i), i), 1: Logprob(-0.1, 1)} for i in (6, 7, 8, 9))]
    given = [output.prompt_logprobs for output in outputs]
    assert given == ([expected, None] if kind is DELTA else [expected] * len(outputs))
