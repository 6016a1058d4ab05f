"""Command-line flags of the engine, which several commands share, and the parser of every command.

Flags are made from the fields of `EngineArgs` (and of the server's `ServeArgs`), with their help and sections, so that
the two cannot drift apart. Flags not given are left out of the namespace, so that defaults live in one place.
"""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from mini_vllm.engine.arg_utils import EngineArgs, is_vllm_argument
from mini_vllm.exceptions import ConfigError

_SECTIONS = {
    "model": "model",
    "load": "loading of weights",
    "quantization": "quantisation of weights",
    "cache": "KV cache",
    "scheduler": "scheduler",
    "device": "device",
    "logging": "logging",
}
_SIZES = ("max_model_len", "kv_cache_memory_bytes")
_METAVARS = {
    "model": "DIR", "tokenizer": "DIR", "host": "ADDRESS", "uds": "PATH", "root_path": "PATH", "api_key": "KEY",
    "api_key_file": "FILE", "record_trace": "FILE", "otlp_traces_endpoint": "URL", "chat_template": "FILE",
    "default_chat_template_kwargs": "JSON", "ssl_keyfile": "FILE", "ssl_certfile": "FILE", "ssl_ca_certs": "FILE",
    "allowed_origins": "ORIGIN", "disable_access_log_for_endpoints": "PATHS", "ssl_ciphers": "LIST",
}  # fmt: skip


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as written and leaves room for long flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


class CommandParser(argparse.ArgumentParser):
    """Of one command. A flag it does not know is refused with the nearest one that it does.

    not_here: for names of flags that others have, why they are none of ours. rewrite: done to the words first.
    """

    not_here: Mapping[str, str] = {}
    rewrite: Callable[[Sequence[str]], list[str]] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else args
        try:
            words = self.rewrite(words) if self.rewrite is not None else words
        except ConfigError as error:
            self.error(str(error))
        namespace, unknown = super().parse_known_args(words, namespace)
        for word in unknown:
            if word.startswith("--"):
                self._refuse(word.partition("=")[0])
        return namespace, unknown

    def _refuse(self, flag: str) -> NoReturn:
        name = flag[2:].replace("-", "_")
        why = self.not_here.get(name) or self.not_here.get(name.removeprefix("no_"))
        if why is None and is_vllm_argument(name):
            why = "vLLM has this flag, but it is not supported here yet"
        if why is None:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
            why = f"no such flag; did you mean {nearest[0]}?" if nearest else "no such flag; --help lists them"
        self.error(f"{flag}: {why}")


def add_engine_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """One flag for each field of `EngineArgs`. `defaults` are this command's own where they differ."""
    groups = add_arguments_of(EngineArgs, _SECTIONS, parser, defaults)
    verbose = groups["logging"]
    verbose.add_argument("-v", "--verbose", action="store_true", help="Show the engine's log on standard error.")


def add_arguments_of(
    cls: Any, sections: Mapping[str, str], parser: argparse.ArgumentParser, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """One flag for each field of a dataclass, in groups by the `section` of its metadata. Returns the groups.

    Fields of other sections get none.
    """
    groups = {key: parser.add_argument_group(title) for key, title in sections.items()}
    for field in dataclasses.fields(cls):
        if field.metadata["section"] in groups:
            _add_field(groups[field.metadata["section"]], field, defaults)
    return groups


def _add_field(group: Any, field: "dataclasses.Field[Any]", defaults: Mapping[str, Any]) -> None:
    flag = "--" + field.name.replace("_", "-")
    default = defaults.get(field.name, field.default)
    text = field.metadata["help"].replace("%", "%%")
    options: dict[str, Any] = {"dest": field.name, "default": defaults.get(field.name, argparse.SUPPRESS)}
    if field.type in (bool, bool | None):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text, **options)
        return
    if default not in (None, (), "", dataclasses.MISSING):
        text += f" Default: {' '.join(default) if isinstance(default, tuple) else default}."
    if field.metadata.get("choices"):
        options["choices"] = field.metadata["choices"]
    if many := field.metadata.get("many"):
        options |= {"action": "extend", "nargs": "+"} if many == "words" else {"action": "append"}
    options["type"] = _parser_of(field)
    group.add_argument(flag, metavar=None if "choices" in options else _metavar(field), help=text, **options)


def _parser_of(field: "dataclasses.Field[Any]") -> Callable[[str], Any]:
    if field.name in _SIZES or field.metadata.get("size"):
        return str  # a unit may follow, which the dataclass reads
    kinds = str(field.type)
    if "int" in kinds and "str" not in kinds:
        return _int_or_none if field.name == "seed" else int
    return float if field.type is float else str


def _int_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _metavar(field: "dataclasses.Field[Any]") -> str:
    if field.name in _SIZES or field.metadata.get("size"):
        return "SIZE"
    if field.name in _METAVARS:
        return _METAVARS[field.name]
    return {int: "N", float: "X", str: "NAME", _int_or_none: "N"}.get(_parser_of(field), "N")


def engine_args_from(namespace: argparse.Namespace) -> EngineArgs:
    """The `EngineArgs` that were asked for."""
    names = {field.name for field in dataclasses.fields(EngineArgs)}
    return EngineArgs.from_kwargs(**{name: value for name, value in vars(namespace).items() if name in names})


def beside_an_api(args: EngineArgs) -> EngineArgs:
    """The bundled model on one thread, unless asked otherwise: its layers are so small that a second thread costs more
    than it does, and whoever turns its tokens into text needs a core."""
    return dataclasses.replace(args, num_threads=1) if args.model is None and args.num_threads is None else args


def read_text_file(path: str, what: str) -> str:
    """A text file's content. Raises `ConfigError` naming the flag it came from."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what}: cannot read {path!r}: {error}") from error
