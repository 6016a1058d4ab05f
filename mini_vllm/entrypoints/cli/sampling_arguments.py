"""Command-line flags of sampling: one for each field of `SamplingParams` that can be written on a command line.

Flags not given are left out of the namespace: what they leave open comes from the model's generation_config.json.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from mini_vllm.sampling_params import SamplingParams


def _ids(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    return int(token_id), float(bias)


_ids.__name__ = "list of token ids"  # what argparse calls a value that does not parse
_bias.__name__ = "bias (such as 17=-2.5)"


@dataclasses.dataclass(frozen=True)
class _Flag:
    """kind: from text to value; bool for a switch. repeated: may be given several times, all count."""

    kind: Callable[[str], Any]
    metavar: str
    help: str
    repeated: bool = False


_SECTIONS: dict[str, dict[str, _Flag]] = {
    "sampling": {
        "n": _Flag(int, "N", "Completions of each prompt; the prompt is computed once."),
        "temperature": _Flag(float, "X", "0 always takes the likeliest token; 1 samples from the model as it is."),
        "top_p": _Flag(float, "X", "Sample from the likeliest tokens that together have this probability."),
        "top_k": _Flag(int, "N", "Sample from this many likeliest tokens; 0 from all."),
        "min_p": _Flag(float, "X", "Sample from tokens at least this fraction as likely as the likeliest."),
        "sampling_seed": _Flag(int, "N", "The same seed gives the same text, whatever else runs."),
    },
    "penalties, biases and bans": {
        "repetition_penalty": _Flag(float, "X", "Above 1 makes what prompt and output have less likely; 1 is off."),
        "presence_penalty": _Flag(float, "X", "Above 0 makes what the output has less likely, -2 to 2."),
        "frequency_penalty": _Flag(float, "X", "The same, the more the oftener it is there, -2 to 2."),
        "logit_bias": _Flag(_bias, "ID=X", "Add X to the logit of a token; may be repeated.", repeated=True),
        "allowed_token_ids": _Flag(_ids, "IDS", "Sample none but these, such as 5,17,300."),
        "bad_words": _Flag(str, "TEXT", "A text that may not appear; may be repeated.", repeated=True),
    },
    "where to stop": {
        "max_tokens": _Flag(int, "N", "Tokens to generate at most."),
        "min_tokens": _Flag(int, "N", "Tokens to generate before anything may stop it."),
        "stop": _Flag(str, "TEXT", "Stop where the text comes to this; may be repeated.", repeated=True),
        "stop_token_ids": _Flag(_ids, "IDS", "Stop after any of these tokens, such as 5,17."),
        "include_stop_str_in_output": _Flag(bool, "", "Leave what stopped it in the text."),
        "ignore_eos": _Flag(bool, "", "Go on after the end-of-sequence token."),
    },
    "logprobs and text": {
        "logprobs": _Flag(int, "N", "With --json: logprobs of each token and of the N likeliest; -1 of all."),
        "prompt_logprobs": _Flag(int, "N", "The same for the prompt's tokens."),
        "logprob_token_ids": _Flag(_ids, "IDS", "With --json: logprobs of these tokens at each position."),
        "skip_special_tokens": _Flag(bool, "", "Leave special tokens out of the text (the default)."),
        "spaces_between_special_tokens": _Flag(bool, "", "Put spaces between special tokens that are shown."),
    },
}
_DEFAULT_TRUE = ("skip_special_tokens", "spaces_between_special_tokens")
LOGPROB_FLAGS = ("logprobs", "prompt_logprobs", "logprob_token_ids")
_NOT_JUST_TEXT = ("n", *LOGPROB_FLAGS)


def add_sampling_arguments(parser: argparse.ArgumentParser, *, just_text: bool = False, **defaults: Any) -> None:
    """Flags of `SamplingParams` by section. just_text: without those that give more than one text a prompt.
    `defaults` are this command's own."""
    for section, flags in _SECTIONS.items():
        group = parser.add_argument_group(section)
        for name, flag in flags.items():
            if not (just_text and name in _NOT_JUST_TEXT):
                _add_flag(group, name, flag, defaults)


def _add_flag(group: Any, name: str, flag: _Flag, defaults: dict[str, Any]) -> None:
    shown = f" Default: {defaults[name]}." if name in defaults else ""
    options = {"dest": name, "default": defaults.get(name, argparse.SUPPRESS), "help": flag.help + shown}
    if flag.kind is not bool:
        action = "append" if flag.repeated else "store"
        group.add_argument(spelt(name), type=flag.kind, metavar=flag.metavar, action=action, **options)
    elif name in _DEFAULT_TRUE:
        group.add_argument(spelt(name), action=argparse.BooleanOptionalAction, **options)
    else:
        group.add_argument(spelt(name), action="store_true", **options)


def spelt(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def sampling_fields_from(namespace: argparse.Namespace) -> dict[str, Any]:
    """What was asked for on the command line, by the names of `SamplingParams`, which are those of a request's body."""
    names = [name for flags in _SECTIONS.values() for name in flags]
    given = {name: getattr(namespace, name) for name in names if getattr(namespace, name, None) is not None}
    if "sampling_seed" in given:
        given["seed"] = given.pop("sampling_seed")
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return given


def sampling_params_from(namespace: argparse.Namespace, base: SamplingParams, **changes: Any) -> SamplingParams:
    """`base` with what was asked for on the command line."""
    return dataclasses.replace(base, **sampling_fields_from(namespace), **changes)
