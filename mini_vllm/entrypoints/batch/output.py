"""The output of a batch: one line for each line of the input, in its order, safe against being killed.

Lines that are done before those ahead of them wait in a bounded buffer, and in a file beside the output
(`OUTPUT.ahead`), so that a kill loses nothing that was finished but a line half written. `scan_output` finds out what
an earlier run left; `Patch` puts new answers in the place of failed ones.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec

from mini_vllm.exceptions import ConfigError


class Answered(msgspec.Struct):
    """What a line of the output says, as far as going on needs it."""

    custom_id: str | None = None
    response: dict[str, object] | None = None
    error: object = None

    @property
    def succeeded(self) -> bool:
        return self.error is None and self.response is not None and self.response.get("status_code") == 200


_decoder = msgspec.json.Decoder(Answered)


def read_answer(line: bytes) -> Answered:
    """Raises `msgspec.MsgspecError`."""
    return _decoder.decode(line)


class OrderedOutput:
    """`add` lines in any order; `write` gets them in the order of their positions.

    position: of the next line to be written. ahead: where lines wait on disk; None keeps them in memory alone.
    """

    def __init__(self, write: Callable[[bytes], None], position: int = 0, ahead: Path | None = None) -> None:
        self.position = position
        self._write = write
        self._waiting: dict[int, bytes] = {}
        self._ahead = Ahead(ahead) if ahead is not None else None

    def preload(self, waiting: dict[int, bytes]) -> None:
        """Lines that an earlier run finished."""
        self._waiting |= {position: line for position, line in waiting.items() if position >= self.position}
        self._drain()

    def has(self, position: int) -> bool:
        return position < self.position or position in self._waiting

    def add(self, position: int, line: bytes) -> None:
        self._waiting[position] = line
        if position != self.position and self._ahead is not None:
            self._ahead.append(position, line)
        self._drain()

    def _drain(self) -> None:
        while (line := self._waiting.pop(self.position, None)) is not None:
            self._write(line)
            self.position += 1
        if not self._waiting and self._ahead is not None:
            self._ahead.clear()

    def close(self) -> None:
        """What waits stays in the file, for the run that goes on."""
        if self._ahead is not None:
            self._ahead.close(remove=not self._waiting)


class Ahead:
    """The file of lines that wait: 'POSITION LINE' each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def append(self, position: int, line: bytes) -> None:
        if self._file is None:
            self._file = self._path.open("ab")
        self._file.write(b"%d %s\n" % (position, line))
        self._file.flush()

    def clear(self) -> None:
        if self._file is not None and self._file.tell():
            self._file.truncate(0)
            self._file.seek(0)

    def close(self, *, remove: bool) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if remove:
            self._path.unlink(missing_ok=True)


def read_ahead(path: Path) -> dict[int, bytes]:
    """What waited when an earlier run ended; a line half written is left out."""
    waiting: dict[int, bytes] = {}
    if path.exists():
        for entry in path.read_bytes().split(b"\n")[:-1]:
            position, _, line = entry.partition(b" ")
            if position.isdigit() and _is_whole(line):
                waiting[int(position)] = line
    return waiting


def _is_whole(line: bytes) -> bool:
    try:
        read_answer(line)
    except msgspec.MsgspecError:
        return False
    return True


# --- what an earlier run left ------------------------------------------------------------------------------------


@dataclass
class Earlier:
    """num_lines: whole lines of the output. num_bytes: where they end. failed: their positions that failed."""

    num_lines: int = 0
    num_bytes: int = 0
    failed: list[int] = field(default_factory=list)


def scan_output(path: Path, custom_ids: Iterator[str | None]) -> Earlier:
    """Compare an output with the custom_ids of its input. Raises `ConfigError` when it belongs to another input."""
    earlier = Earlier()
    if not path.exists():
        return earlier
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n") or not _is_whole(raw):
                break  # torn by a kill
            answer = read_answer(raw)
            _require_same(path, earlier.num_lines, answer.custom_id, custom_ids)
            if not answer.succeeded:
                earlier.failed.append(earlier.num_lines)
            earlier.num_lines += 1
            earlier.num_bytes += len(raw)
        if file.readline():
            raise ConfigError(f"resume: line {earlier.num_lines + 1} of {path} is no answer; is it another file?")
    return earlier


def _require_same(path: Path, position: int, custom_id: str | None, custom_ids: Iterator[str | None]) -> None:
    missing = object()
    wanted = next(custom_ids, missing)
    if wanted is missing or wanted != custom_id:
        raise ConfigError(
            f"resume: line {position + 1} of {path} answers custom_id {custom_id!r}, which is not that of the input's: "
            "the output belongs to another input"
        )


class Patch:
    """Copies an output, with new lines in the place of those at `positions`; then takes its place."""

    def __init__(self, path: Path, positions: list[int]) -> None:
        self._path, self._target = path, path.with_name(path.name + ".new")
        self._positions = iter(positions)
        self._old = path.open("rb")
        self._new = self._target.open("wb")
        self._at = 0

    def write(self, line: bytes) -> None:
        """The line for the next of the positions."""
        position = next(self._positions)
        while self._at < position:
            self._new.write(self._old.readline())
            self._at += 1
        self._old.readline()
        self._at += 1
        self._new.write(line + b"\n")

    def finish(self) -> None:
        while chunk := self._old.read(1 << 20):
            self._new.write(chunk)
        self._new.flush()
        os.fsync(self._new.fileno())
        self.close()
        os.replace(self._target, self._path)

    def close(self) -> None:
        """Leaves the output as it was, unless `finish` was called."""
        self._old.close()
        self._new.close()
