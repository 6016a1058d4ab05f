"""Beam search in place of sampling: what `AsyncLLM.beam_search` finds, as if it were outputs of the engine.

Answers are then built as ever. A search has nothing to stream before it ends; its text comes in one event a choice.
"""

from collections.abc import Sequence

from mini_vllm.engine.input_processor import TokenizedPrompt
from mini_vllm.engine.protocol import RequestStream
from mini_vllm.entrypoints.openai.call import Call
from mini_vllm.entrypoints.openai.sampling import beam_params
from mini_vllm.entrypoints.server.disconnect import run_until_disconnect
from mini_vllm.outputs import BeamSearchSequence, CompletionOutput, LogprobsAtPosition, RequestOutput
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.text.detokenizer import IncrementalDetokenizer


class FinishedStream:
    """A `RequestStream` whose one output is there already."""

    def __init__(self, output: RequestOutput) -> None:
        self._output: RequestOutput | None = output
        self._request_id = output.request_id

    @property
    def request_id(self) -> str:
        return self._request_id

    def __aiter__(self) -> "FinishedStream":
        return self

    async def __anext__(self) -> RequestOutput:
        output, self._output = self._output, None
        if output is None:
            raise StopAsyncIteration
        return output

    async def aclose(self) -> None:
        self._output = None


async def search_beams(
    call: Call, prompts: Sequence[TokenizedPrompt], params: Sequence[SamplingParams]
) -> list[RequestStream]:
    """The `n` likeliest outputs of each prompt, one prompt after another: a search fills the batch by itself."""

    async def search_all() -> list[RequestOutput]:
        pairs = enumerate(zip(prompts, params, strict=True))
        return [await _search(call, call.engine_id(f"-{i}"), prompt, one) for i, (prompt, one) in pairs]

    return [FinishedStream(output) for output in await run_until_disconnect(call.request, search_all())]


async def _search(call: Call, request_id: str, prompt: TokenizedPrompt, params: SamplingParams) -> RequestOutput:
    found = await call.engine.beam_search(
        prompt,
        beam_params(call.body, params.max_tokens or 1),
        request_id,
        priority=call.body.priority or 0,
        cache_salt=call.context.cache_salt(call.body.cache_salt),
        tenant=call.context.tenant(call.body.user),
    )
    choices = [_choice(call, prompt, params, index, beam) for index, beam in enumerate(found.sequences)]
    return RequestOutput(request_id, prompt.text, prompt.token_ids, choices, finished=True)


def _choice(
    call: Call, prompt: TokenizedPrompt, params: SamplingParams, index: int, beam: BeamSearchSequence
) -> CompletionOutput:
    processor = call.engine.input_processor
    shown = beam.tokens[len(prompt.token_ids) :]
    detokenizer = IncrementalDetokenizer(
        processor.tokenizer, prompt.token_ids, params.skip_special_tokens, params.spaces_between_special_tokens
    )
    token_ids = list(shown)
    if len(token_ids) < len(beam.logprobs) and isinstance(beam.stop_reason, int):
        token_ids.append(beam.stop_reason)  # the end of sequence was generated, though it has no text
    return CompletionOutput(
        index=index,
        text=detokenizer.update(shown) + detokenizer.flush(),
        token_ids=token_ids,
        logprobs=_reported(token_ids, beam.logprobs, params.logprobs),
        finish_reason=beam.finish_reason,
        stop_reason=None if beam.stop_reason == processor.eos_token_id else beam.stop_reason,
    )


def _reported(
    token_ids: Sequence[int], logprobs: Sequence[LogprobsAtPosition], count: int | None
) -> list[LogprobsAtPosition] | None:
    """The search looks at more than was asked for."""
    if count is None:
        return None
    return [
        {i: entry for i, entry in entries.items() if i == token_id or count < 0 or (entry.rank or 0) <= count}
        for token_id, entries in zip(token_ids, logprobs, strict=True)
    ]
