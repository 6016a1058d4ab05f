"""The events of streamed answers as bytes.

Nearly all events say one thing: here is more text of choice i. Everything else in them is constant, so that it is
encoded once and each of them costs one JSON string. The others (the first, the last, those with logprobs, ids or
usage) are built as structs.
"""

import msgspec

from mini_vllm.entrypoints.openai.bodies import Chunk
from mini_vllm.entrypoints.openai.call import Call
from mini_vllm.entrypoints.server.encoding import encode
from mini_vllm.entrypoints.server.streaming import data_event

_encode_text = msgspec.json.Encoder().encode


class EventWriter:
    """For one answer. kind: its `object`. before_text, after_text: what a choice has around its text."""

    def __init__(self, call: Call, kind: str, before_text: bytes, after_text: bytes) -> None:
        self._call = call
        self._kind = kind
        self._before_text = before_text
        self._after_text = after_text + b"}]}\n\n"
        self._heads: dict[int, bytes] = {}

    def text(self, index: int, text: str) -> bytes:
        """More text of a choice that goes on, and nothing else."""
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = self._head(index)
        return head + _encode_text(text) + self._after_text

    def chunk(self, *choices: object) -> Chunk:
        call = self._call
        return Chunk(id=call.id, object=self._kind, created=call.created, model=call.model, choices=list(choices))

    def _head(self, index: int) -> bytes:
        whole = encode(self.chunk())
        assert whole.endswith(b"]}")
        return b"data: " + whole[:-2] + b'{"index":%d,' % index + self._before_text


def event(chunk: Chunk) -> bytes:
    return data_event(encode(chunk))
