"""The events of a streamed message, in Anthropic's order.

    message_start, content_block_start, ping, content_block_delta ..., content_block_stop, message_delta, message_stop

`message_start` waits for the first output of the engine: only then is it known how much of the prompt came from the
prefix cache, and so its usage is that of `message_delta`. There is no block when the model wrote nothing.
"""

from collections.abc import AsyncIterator

from mini_vllm.engine.protocol import RequestStream
from mini_vllm.entrypoints.anthropic.answer import Answer
from mini_vllm.entrypoints.anthropic.protocol import DeltaUsage, TextContent
from mini_vllm.entrypoints.server.encoding import encode
from mini_vllm.entrypoints.server.streaming import named_event

_BLOCK_START = named_event(
    "content_block_start",
    encode({"type": "content_block_start", "index": 0, "content_block": TextContent(text="")}),
) + named_event("ping", b'{"type":"ping"}')
_BLOCK_STOP = named_event("content_block_stop", b'{"type":"content_block_stop","index":0}')
_MESSAGE_STOP = named_event("message_stop", b'{"type":"message_stop"}')
_DELTA = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":%b}}\n\n'
)


async def message_events(answer: Answer, stream: RequestStream) -> AsyncIterator[bytes]:
    """The frames of one message. Raises what goes wrong."""
    opened = False
    async for output in stream:
        if answer.last is None:
            answer.take(output)
            yield named_event("message_start", encode({"type": "message_start", "message": answer.beginning()}))
        else:
            answer.take(output)
        text = output.outputs[0].text
        if text:
            if not opened:
                opened = True
                yield _BLOCK_START
            yield _DELTA % encode(text)
    message = answer.message()
    if opened:
        yield _BLOCK_STOP
    delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
    usage = message.usage
    shown = DeltaUsage(
        input_tokens=usage.input_tokens,
        cache_read_input_tokens=usage.cache_read_input_tokens,
        output_tokens=usage.output_tokens,
    )
    yield named_event("message_delta", encode({"type": "message_delta", "delta": delta, "usage": shown}))
    yield _MESSAGE_STOP
