"""Command-line flags of the engine, which several commands share.

They are made from the fields of `EngineArgs`, with their help and sections, so that the two cannot drift apart. Flags
not given are left out of the namespace, so that defaults live in one place.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.exceptions import ConfigError

_SECTIONS = {
    "model": "model",
    "load": "loading of weights",
    "cache": "KV cache",
    "scheduler": "scheduler",
    "device": "device",
    "logging": "logging",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as written and leaves room for long flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def add_engine_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """One flag for each field of `EngineArgs`. `defaults` are this command's own where they differ."""
    groups = {key: parser.add_argument_group(title) for key, title in _SECTIONS.items()}
    for field in dataclasses.fields(EngineArgs):
        _add_field(groups[field.metadata["section"]], field, defaults)
    verbose = groups["logging"]
    verbose.add_argument("-v", "--verbose", action="store_true", help="Show the engine's log on standard error.")


def _add_field(group: Any, field: "dataclasses.Field[Any]", defaults: dict[str, Any]) -> None:
    flag = "--" + field.name.replace("_", "-")
    default = defaults.get(field.name, field.default)
    text = field.metadata["help"].replace("%", "%%")
    options: dict[str, Any] = {"dest": field.name, "default": defaults.get(field.name, argparse.SUPPRESS)}
    if field.type is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **options)
        return
    if default is not None:
        text += f" Default: {default}."
    if field.metadata["choices"]:
        options["choices"] = field.metadata["choices"]
    options["type"] = _parser_of(field)
    group.add_argument(flag, metavar=None if "choices" in options else _metavar(field), help=text, **options)


def _parser_of(field: "dataclasses.Field[Any]") -> Callable[[str], Any]:
    if field.name in ("max_model_len", "kv_cache_memory_bytes"):
        return str  # EngineArgs reads the units
    kinds = str(field.type)
    if "int" in kinds and "str" not in kinds:
        return _int_or_none if field.name == "seed" else int
    return float if field.type is float else str


def _int_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _metavar(field: "dataclasses.Field[Any]") -> str:
    if field.name in ("model", "tokenizer"):
        return "DIR"
    if field.name in ("max_model_len", "kv_cache_memory_bytes"):
        return "SIZE"
    return {int: "N", float: "X", str: "NAME", _int_or_none: "N"}.get(_parser_of(field), "N")


def engine_args_from(namespace: argparse.Namespace) -> EngineArgs:
    """The `EngineArgs` that were asked for."""
    names = {field.name for field in dataclasses.fields(EngineArgs)}
    return EngineArgs.from_kwargs(**{name: value for name, value in vars(namespace).items() if name in names})


def read_text_file(path: str, what: str) -> str:
    """A text file's content. Raises `ConfigError` naming the flag it came from."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what}: cannot read {path!r}: {error}") from error
