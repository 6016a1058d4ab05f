"""Bodies of responses: msgspec structs and plain dicts to JSON bytes, without going through pydantic."""

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

_encoder = msgspec.json.Encoder()


def encode(obj: Any) -> bytes:
    """The JSON of a msgspec struct, a dataclass, or of dicts and lists of these. NaN becomes null."""
    return _encoder.encode(obj)


def json_response(obj: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response; `obj` as for `encode`."""
    return Response(encode(obj), status, headers, media_type="application/json")
