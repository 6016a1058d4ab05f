"""What the engine has said about one message so far, in Anthropic's words."""

from mini_vllm.entrypoints.anthropic.protocol import Message, TextContent, Usage
from mini_vllm.exceptions import OverloadedError
from mini_vllm.outputs import RequestOutput


class Answer:
    """Collects outputs, deltas or the whole at once.

    max_tokens: of the request; an output that ends before it for want of room has filled the context.
    """

    def __init__(self, message_id: str, model: str, max_tokens: int) -> None:
        self.last: RequestOutput | None = None
        self._id = message_id
        self._model = model
        self._max_tokens = max_tokens
        self._texts: list[str] = []
        self._num_tokens = 0

    def take(self, output: RequestOutput) -> None:
        self.last = output
        self._texts.append(output.outputs[0].text)
        self._num_tokens += len(output.outputs[0].token_ids)

    def beginning(self) -> Message:
        """The message of `message_start`."""
        return Message(
            id=self._id, model=self._model, content=[], stop_reason=None, stop_sequence=None, usage=self._usage()
        )

    def message(self) -> Message:
        """The whole message. Raises `OverloadedError` if the server ended it."""
        stop_reason, stop_sequence = self._stop()
        text = "".join(self._texts)
        return Message(
            id=self._id,
            model=self._model,
            content=[TextContent(text=text)] if text else [],
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=self._usage(),
        )

    def _usage(self) -> Usage:
        assert self.last is not None
        cached = self.last.num_cached_tokens
        return Usage(
            input_tokens=len(self.last.prompt_token_ids) - cached,
            cache_read_input_tokens=cached,
            output_tokens=self._num_tokens,
        )

    def _stop(self) -> tuple[str, str | None]:
        completion = self.last.outputs[0] if self.last is not None else None
        if completion is None or completion.finish_reason not in ("stop", "length"):
            raise OverloadedError("the request was aborted: the server is shutting down", "shutting_down")
        if completion.finish_reason == "length":
            filled = self._num_tokens < self._max_tokens
            return ("model_context_window_exceeded" if filled else "max_tokens"), None
        if isinstance(completion.stop_reason, str):
            return "stop_sequence", completion.stop_reason
        return "end_turn", None  # an end-of-sequence token
