"""Flags from a YAML file: they are read as if they stood on the command line before those that do."""

import json
from collections.abc import Sequence
from typing import Any

from mini_vllm.entrypoints.cli.arguments import read_text_file
from mini_vllm.exceptions import ConfigError


def with_config_file(argv: Sequence[str]) -> list[str]:
    """`argv` (of one command) with the content of `--config FILE`, if it is there, put in front."""
    words = list(argv)
    for i, word in enumerate(words):
        if word == "--config" and i + 1 < len(words):
            return [*_flags_of(words[i + 1]), *words[:i], *words[i + 2 :]]
        if word.startswith("--config="):
            return [*_flags_of(word.partition("=")[2]), *words[:i], *words[i + 1 :]]
    return words


def _flags_of(path: str) -> list[str]:
    import yaml

    try:
        content = yaml.safe_load(read_text_file(path, "config"))
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {path!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"config: {path!r} must be a mapping of flags to values")
    return [word for name, value in content.items() for word in _words(name.replace("_", "-"), value)]


def _words(name: str, value: Any) -> list[str]:
    """The flag as it would be typed. Values are joined to it by '=', so that one may begin with a dash."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{name}={item}" for item in value]
    return [f"--{name}={value}"]
