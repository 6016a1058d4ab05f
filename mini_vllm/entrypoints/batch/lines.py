"""The input of a batch: JSON lines of {custom_id, method, url, body}, read one at a time.

Every line that is not blank becomes a `BatchLine`, in order; one that cannot be run says why in `problem` instead of
ending the job.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import msgspec

URLS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
"""What a line may ask for."""

_MAX_ID = 512


class Problem(msgspec.Struct, frozen=True):
    """Why a line cannot be run, in the shape of the API's errors."""

    message: str
    param: str | None = None
    type: str = "invalid_request_error"
    code: str | int | None = 400


@dataclass(frozen=True)
class BatchLine:
    """position: among the lines that are not blank, from 0. number: in the file, from 1. body: JSON as it was given."""

    position: int
    number: int
    custom_id: str | None = None
    url: str = ""
    body: bytes = b""
    problem: Problem | None = None


class _Line(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _JustId(msgspec.Struct):
    custom_id: str | None = None


class _Peek(msgspec.Struct):
    stream: object = None


_decoder = msgspec.json.Decoder(_Line)
_id_decoder = msgspec.json.Decoder(_JustId)
_peek = msgspec.json.Decoder(_Peek)


def read_batch(path: Path, max_line_bytes: int) -> Iterator[BatchLine]:
    """The lines of a file. Longer ones than `max_line_bytes` are problems, and are never held in memory whole."""
    with path.open("rb") as file:
        seen: dict[bytes, int] = {}
        for position, (number, raw, too_long) in enumerate(_raw_lines(file, max_line_bytes)):
            if too_long:
                problem = Problem(f"line {number}: has more than {max_line_bytes} bytes")
                yield BatchLine(position, number, problem=problem)
            else:
                yield _without_duplicates(_parsed(position, number, raw), seen)


def count_lines(path: Path) -> int:
    """Lines that are not blank."""
    with path.open("rb") as file:
        return sum(1 for _ in _raw_lines(file, 1 << 16))


def _raw_lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """(number, the line or its beginning, whether it was cut) of every line that is not blank."""
    number = 0
    while raw := file.readline(limit + 2):
        number += 1
        rest = raw
        while not rest.endswith(b"\n") and (rest := file.readline(1 << 16)):
            pass
        stripped = raw.strip()
        if stripped:
            yield number, stripped, len(stripped) > limit


def _parsed(position: int, number: int, raw: bytes) -> BatchLine:
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        line = _decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return BatchLine(position, number, _readable_id(raw), problem=Problem(f"line {number}: {error}"))
    problem = _problem_of(line, number)
    return BatchLine(position, number, line.custom_id[:_MAX_ID], line.url, bytes(line.body), problem)


def _readable_id(raw: bytes) -> str | None:
    """The custom_id of a line that is wrong in another place."""
    try:
        custom_id = _id_decoder.decode(raw).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return custom_id and custom_id[:_MAX_ID]


def _problem_of(line: _Line, number: int) -> Problem | None:
    where = f"line {number}: "
    if not 0 < len(line.custom_id) <= _MAX_ID:
        return Problem(f"{where}custom_id must have from 1 to {_MAX_ID} characters", "custom_id")
    if line.method != "POST":
        return Problem(f"{where}method must be POST, got {line.method[:20]!r}", "method")
    if line.url not in URLS:
        return Problem(f"{where}url must be one of {', '.join(URLS)}, got {line.url[:100]!r}", "url")
    try:
        streams = bool(_peek.decode(line.body).stream)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None  # whatever is wrong with the body, the handler says it best
    return Problem(f"{where}stream: a batch has no streams", "body.stream") if streams else None


def _without_duplicates(line: BatchLine, seen: dict[bytes, int]) -> BatchLine:
    """A custom_id that came before cannot be told from it in the output."""
    if line.custom_id is None:
        return line
    digest = blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=12).digest()
    first = seen.setdefault(digest, line.number)
    if first == line.number:
        return line
    problem = Problem(f"line {line.number}: custom_id {line.custom_id!r} was used on line {first} already", "custom_id")
    return BatchLine(line.position, line.number, line.custom_id, problem=problem)
