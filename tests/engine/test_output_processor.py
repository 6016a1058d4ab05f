"""Claims about what callers get: by output kind, in text and ids, and that nothing stays behind."""

import gc
import weakref
from pathlib import Path

import pytest

from mini_vllm.core.scheduler_output import EngineCoreOutput
from mini_vllm.engine.output_processor import OutputProcessor
from mini_vllm.outputs import RequestOutput
from mini_vllm.request import Request
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams
from mini_vllm.text.tokenizer import Tokenizer

TEXT = "naïve café 東京 🙂 and more"


@pytest.fixture
def tokenizer(llama: Path) -> Tokenizer:
    return Tokenizer.from_folder(llama)


def play(
    processor: OutputProcessor, ids: list[int], params: SamplingParams, request_id: str = "r"
) -> list[RequestOutput]:
    """One id a step, the last with a finish reason; the clock is the step number."""
    processor.add_request(Request(request_id, [1, 5], params, arrival_time=-1.0), "prompt")
    outputs: list[RequestOutput] = []
    for step, token_id in enumerate(ids):
        reason = "length" if step == len(ids) - 1 else None
        news = EngineCoreOutput(request_id, [token_id], finish_reason=reason, num_cached_tokens=1, num_preemptions=3)
        outputs += processor.process([news], float(step))
    return outputs


@pytest.mark.parametrize("skip", [True, False])
def test_deltas_add_up_to_the_cumulative_and_the_final_text(tokenizer: Tokenizer, skip: bool) -> None:
    processor = OutputProcessor(tokenizer)
    ids = tokenizer.encode(TEXT)

    def run(kind: RequestOutputKind) -> list[RequestOutput]:
        return play(processor, ids, SamplingParams(output_kind=kind, skip_special_tokens=skip))

    delta, cumulative, final = (
        run(kind) for kind in (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY)
    )
    assert len(delta) == len(cumulative) == len(ids) and len(final) == 1
    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(output.outputs[0].text for output in delta) == expected
    assert cumulative[-1].outputs[0].text == final[0].outputs[0].text == expected
    assert [i for output in delta for i in output.outputs[0].token_ids] == final[0].outputs[0].token_ids == ids
    running = ""
    for piece, so_far in zip(delta, cumulative, strict=True):
        running += piece.outputs[0].text
        assert so_far.outputs[0].text == running
    assert [output.finished for output in cumulative] == [False] * (len(ids) - 1) + [True]


def test_earlier_cumulative_outputs_do_not_change_afterwards(tokenizer: Tokenizer) -> None:
    outputs = play(OutputProcessor(tokenizer), [10, 11, 12], SamplingParams())
    assert [output.outputs[0].token_ids for output in outputs] == [[10], [10, 11], [10, 11, 12]]


def test_text_cut_in_mid_character_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂", add_special_tokens=False)[:-1]
    final = play(OutputProcessor(tokenizer), ids, SamplingParams())[-1]
    assert final.outputs[0].text == tokenizer.decode(ids) == "\ufffd"


def test_fields_and_metrics_are_filled(tokenizer: Tokenizer) -> None:
    output = play(OutputProcessor(tokenizer), [10, 11, 12], SamplingParams())[-1]
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "prompt", [1, 5])
    assert (output.finished, output.num_cached_tokens, output.outputs[0].finish_reason) == (True, 1, "length")
    metrics = output.metrics
    assert metrics is not None and metrics.num_preemptions == 3 and metrics.time_to_first_token == 1.0
    times = (metrics.arrival_time, metrics.first_token_time, metrics.last_token_time, metrics.finished_time)
    assert times == (-1.0, 0.0, 2.0, 2.0)


def test_detokenize_false_and_no_tokenizer_give_ids_only(tokenizer: Tokenizer) -> None:
    for processor, detokenize in ((OutputProcessor(tokenizer), False), (OutputProcessor(None), True)):
        output = play(processor, [10, 11], SamplingParams(detokenize=detokenize))[-1].outputs[0]
        assert (output.text, output.token_ids) == ("", [10, 11])


def test_an_error_of_one_request_is_its_own(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    for request_id in "ab":
        processor.add_request(Request(request_id, [1], SamplingParams()), None)
    news = [EngineCoreOutput("a", finish_reason="error", error="no token allowed"), EngineCoreOutput("b", [10])]
    failed, fine = processor.process(news, 0.0)
    assert (failed.error, failed.outputs[0].finish_reason, failed.finished) == ("no token allowed", "error", True)
    assert not fine.finished and fine.error is None and processor.unfinished_request_ids() == ["b"]


def test_an_abort_reports_what_there_was_and_ignores_strangers(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    processor.add_request(Request("a", [1], SamplingParams()), None)
    processor.process([EngineCoreOutput("a", [10])], 0.0)
    (output,) = processor.abort(["a", "a", "nobody"], 5.0)
    assert (output.outputs[0].finish_reason, output.outputs[0].token_ids, output.finished) == ("abort", [10], True)
    assert output.metrics is not None and output.metrics.finished_time == 5.0
    assert processor.abort(["a"], 6.0) == []
    assert processor.process([EngineCoreOutput("a", [11])], 7.0) == [], "late news of a request that is gone"


def test_nothing_of_a_request_outlives_its_end(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer)
    states = []
    for request_id, ends in (("finished", True), ("aborted", False)):
        processor.add_request(Request(request_id, [1], SamplingParams()), None)
        states.append(weakref.ref(processor._requests[request_id].sequences[request_id]))
        if ends:
            processor.process([EngineCoreOutput(request_id, [10], finish_reason="stop")], 0.0)
        else:
            processor.abort([request_id], 0.0)
    gc.collect()
    assert not processor.has_unfinished_requests() and processor.num_unfinished_requests == 0
    assert [state() for state in states] == [None, None]
