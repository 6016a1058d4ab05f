"""Command-line flags that several commands share: those of the engine and those of sampling.

The engine's flags are made from the fields of `EngineArgs`, with their help and sections, so that the two cannot
drift apart. Flags not given are left out of the namespace, so that defaults live in one place.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.exceptions import ConfigError
from mini_vllm.sampling_params import SamplingParams

_SECTIONS = {
    "model": "model",
    "load": "loading of weights",
    "cache": "KV cache",
    "scheduler": "scheduler",
    "device": "device",
    "logging": "logging",
}
_SAMPLING_HELP: dict[str, tuple[Callable[[str], Any], str]] = {
    "max_tokens": (int, "Tokens to generate at most."),
    "temperature": (float, "0 always takes the likeliest token; 1 samples from the model as it is."),
    "top_p": (float, "Sample from the likeliest tokens that together have this probability."),
    "top_k": (int, "Sample from this many likeliest tokens; 0 from all."),
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


def add_sampling_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Flags of `SamplingParams`. Those not given come from the model's generation_config.json."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in _SAMPLING_HELP.items():
        shown = f" Default: {defaults[name]}." if name in defaults else ""
        group.add_argument(
            "--" + name.replace("_", "-"), dest=name, type=kind, metavar="N" if kind is int else "X",
            default=defaults.get(name, argparse.SUPPRESS), help=text + shown,
        )  # fmt: skip
    group.add_argument(
        "--sampling-seed", type=int, metavar="N", default=defaults.get("sampling_seed"),
        help="The same seed gives the same text, whatever else runs."
        + (f" Default: {defaults['sampling_seed']}." if "sampling_seed" in defaults else ""),
    )  # fmt: skip
    group.add_argument("--ignore-eos", action="store_true", help="Go on after the end-of-sequence token.")


def sampling_params_from(namespace: argparse.Namespace, base: SamplingParams, **changes: Any) -> SamplingParams:
    """`base` with what was asked for on the command line."""
    given = {name: getattr(namespace, name) for name in _SAMPLING_HELP if hasattr(namespace, name)}
    if namespace.sampling_seed is not None:
        given["seed"] = namespace.sampling_seed
    return dataclasses.replace(base, ignore_eos=namespace.ignore_eos, **given, **changes)


def read_text_file(path: str, what: str) -> str:
    """A text file's content. Raises `ConfigError` naming the flag it came from."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what}: cannot read {path!r}: {error}") from error
