"""The events of a streamed response: their order, their sequence numbers, and the cheap way to write the many.

    created, in_progress, output_item.added, content_part.added, output_text.delta ..., output_text.done,
    content_part.done, output_item.done, then one of completed, incomplete and failed

A response in the background is `queued` before it is in progress. There is one item, a message, with one part.
"""

from collections.abc import Iterator
from typing import Any

from mini_vllm.entrypoints.openai.bodies import ChatLogprob
from mini_vllm.entrypoints.openai.responses.objects import OutputMessage, OutputText, ResponseObject
from mini_vllm.entrypoints.server.encoding import encode
from mini_vllm.entrypoints.server.streaming import named_event


class EventWriter:
    """The frames of one response, whose object it reads when it writes them."""

    def __init__(self, response: ResponseObject, item_id: str) -> None:
        self._response = response
        self._place: dict[str, Any] = {"item_id": item_id, "output_index": 0, "content_index": 0}
        self._next_number = 0
        head = encode({"type": "response.output_text.delta", **self._place})[:-1]
        self._delta_head = b"event: response.output_text.delta\ndata: " + head + b',"delta":'

    def state(self, name: str) -> bytes:
        """An event that carries the whole response, such as 'created'."""
        return self._event(f"response.{name}", {"response": self._response})

    def item_opening(self, item: OutputMessage) -> Iterator[bytes]:
        """The events before the first delta. `item` is empty."""
        yield self._event("response.output_item.added", {"output_index": 0, "item": item})
        yield self._event("response.content_part.added", {**self._place, "part": OutputText()})

    def delta(self, text: str, logprobs: list[ChatLogprob]) -> bytes:
        number = self._next_number
        self._next_number += 1
        shown = encode(logprobs) if logprobs else b"[]"
        return b'%b%b,"logprobs":%b,"sequence_number":%d}\n\n' % (self._delta_head, encode(text), shown, number)

    def item_closing(self, item: OutputMessage) -> Iterator[bytes]:
        """The events after the last delta. `item` is as it will stay."""
        part = item.content[0]
        done = {**self._place, "text": part.text, "logprobs": part.logprobs}
        yield self._event("response.output_text.done", done)
        yield self._event("response.content_part.done", {**self._place, "part": part})
        yield self._event("response.output_item.done", {"output_index": 0, "item": item})

    def _event(self, name: str, body: dict[str, Any]) -> bytes:
        number = self._next_number
        self._next_number += 1
        return named_event(name, encode({"type": name, "sequence_number": number, **body}))
