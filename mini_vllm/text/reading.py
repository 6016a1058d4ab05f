"""Reading what a checkpoint brings along: files of bounded size, JSON objects, and errors of the Rust side.

Tokenizer files come from strangers. Everything here turns what can be wrong with them into a `CheckpointError` that
names the file; nothing is executed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mini_vllm.exceptions import CheckpointError

MAX_FILE_BYTES = 256 << 20
"""The largest published tokenizer files are below 40 MB."""


def read_bytes(path: Path) -> bytes:
    """The file's bytes. Raises `CheckpointError` when it cannot be read or is larger than `MAX_FILE_BYTES`."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: has {size} bytes; a tokenizer file may have {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """The file's text, which must be UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


@contextmanager
def rust_errors(path: Path, problem: str) -> Iterator[None]:
    """What `tokenizers` raises inside becomes a `CheckpointError`: bare Exceptions, and panics, which are none."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # PanicException derives from BaseException
        raise CheckpointError(f"{path}: {problem}: {error}") from error
