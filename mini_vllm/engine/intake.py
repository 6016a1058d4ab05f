"""The last checks before a request is queued: those that take the engine's state and not only its model."""

from collections.abc import Sequence

from mini_vllm.engine.input_processor import InputProcessor
from mini_vllm.engine.output_processor import OutputProcessor
from mini_vllm.engine.protocol import NewRequest
from mini_vllm.exceptions import InvalidParameterError, PromptTooLongError
from mini_vllm.request import Request


class Intake:
    """Makes the core's requests. max_request_tokens: what a lone request can hold in the KV cache."""

    def __init__(
        self, input_processor: InputProcessor, output_processor: OutputProcessor, max_request_tokens: int
    ) -> None:
        self.input_processor = input_processor
        self.unfinished = output_processor
        self.max_request_tokens = max_request_tokens

    def make_requests(self, requests: Sequence[NewRequest]) -> list[Request]:
        """All of these, or `InvalidParameterError` for the first that cannot be run."""
        made = [self._make_request(new) for new in requests]
        seen: set[str] = set()
        for core_id in [core_id for request in made for core_id in (request.request_id, *request.unborn_ids)]:
            if core_id in seen or core_id in self.unfinished:
                raise InvalidParameterError("request_id", f"{core_id!r} is already in use by an unfinished request")
            seen.add(core_id)
        return made

    def _make_request(self, new: NewRequest) -> Request:
        if not isinstance(new.request_id, str) or not new.request_id:
            raise InvalidParameterError("request_id", f"must be a string that is not empty, got {new.request_id!r}")
        request = self.input_processor.make_request(
            new.request_id,
            new.prompt,
            self.input_processor.resolve_params(new.params),
            arrival_time=new.arrival_time,
            priority=new.priority,
            cache_salt=new.cache_salt,
            tenant=new.tenant,
        )
        if request.num_prompt_tokens > self.max_request_tokens:
            raise PromptTooLongError(
                "prompt",
                f"has {request.num_prompt_tokens} tokens, but the whole KV cache holds {self.max_request_tokens}; give "
                "the cache more memory or shorten the prompt",
            )
        return request
