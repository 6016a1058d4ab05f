"""What is asked of the engine: lists of prompts (token ids) with the number of tokens to generate.

Three sources with vLLM's names and meanings: `random` lengths and tokens, `prefix_repetition` (few prefixes, many
suffixes), and `sharegpt` (conversations in a JSON file). The same arguments and seed give the same list. Prompts are
token ids, so lengths are exact and tokenisation is no part of what is measured.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_vllm.exceptions import InvalidParameterError

# vLLM's filter for conversations: shorter ones measure nothing, longer ones do not fit small deployments
MIN_TOKENS = 4
MAX_PROMPT_TOKENS = 1024
MAX_TOTAL_TOKENS = 2048


@dataclass(frozen=True)
class BenchRequest:
    """One request: its prompt, and how many tokens it generates (end of sequence is ignored)."""

    prompt_token_ids: list[int]
    output_len: int

    @property
    def total_len(self) -> int:
        return len(self.prompt_token_ids) + self.output_len


def require_fit(requests: Sequence[BenchRequest], max_model_len: int, flags: str) -> None:
    """Raise `InvalidParameterError` naming `flags` if a request would not fit the model's context."""
    longest = max(requests, key=lambda request: request.total_len)
    if longest.total_len > max_model_len:
        raise InvalidParameterError(
            flags,
            f"a prompt of {len(longest.prompt_token_ids)} tokens plus {longest.output_len} to generate is "
            f"{longest.total_len}, but the model's context (max_model_len) is {max_model_len}",
        )


def random_tokens(rng: random.Random, token_ids: Sequence[int], count: int) -> list[int]:
    """`count` ids drawn uniformly from `token_ids`."""
    return rng.choices(token_ids, k=count)


# --- random -------------------------------------------------------------------------------------------------


def length_range(length: int, range_ratio: float) -> tuple[int, int]:
    """Shortest and longest length around `length`: [length * (1 - ratio), length * (1 + ratio)], at least 1."""
    return max(int(length * (1 - range_ratio)), 1), max(int(length * (1 + range_ratio)), 1)


def random_requests(
    num_prompts: int,
    token_ids: Sequence[int],
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[BenchRequest]:
    """Prompts of random tokens; lengths uniform within `range_ratio` of `input_len` and `output_len`.

    prefix_len: tokens at the start of every prompt, the same for all, on top of `input_len`.
    """
    _require_at_least("num_prompts", num_prompts, 1)
    _require_at_least("random_input_len", input_len, 1)
    _require_at_least("random_output_len", output_len, 1)
    _require_at_least("random_prefix_len", prefix_len, 0)
    if not 0 <= range_ratio < 1:
        raise InvalidParameterError("random_range_ratio", f"must be in [0, 1), got {range_ratio}")
    rng = random.Random(seed)
    prefix = random_tokens(rng, token_ids, prefix_len)
    inputs, outputs = length_range(input_len, range_ratio), length_range(output_len, range_ratio)
    requests = []
    for _ in range(num_prompts):
        prompt_len, generate = rng.randint(*inputs), rng.randint(*outputs)
        requests.append(BenchRequest(prefix + random_tokens(rng, token_ids, prompt_len), generate))
    return requests


# --- prefix repetition --------------------------------------------------------------------------------------


def prefix_repetition_requests(
    num_prompts: int,
    token_ids: Sequence[int],
    *,
    prefix_len: int,
    suffix_len: int,
    num_prefixes: int,
    output_len: int,
    seed: int = 0,
) -> list[BenchRequest]:
    """`num_prefixes` random prefixes shared out evenly over the prompts, each followed by a suffix of its own.

    The order is shuffled. When `num_prompts` is no multiple of `num_prefixes`, the first prefixes get one more.
    """
    for name, value in (
        ("num_prompts", num_prompts),
        ("prefix_repetition_prefix_len", prefix_len),
        ("prefix_repetition_num_prefixes", num_prefixes),
        ("prefix_repetition_output_len", output_len),
    ):
        _require_at_least(name, value, 1)
    _require_at_least("prefix_repetition_suffix_len", suffix_len, 0)
    if num_prompts < num_prefixes:
        raise InvalidParameterError(
            "prefix_repetition_num_prefixes", f"{num_prefixes} prefixes need as many prompts, num_prompts={num_prompts}"
        )
    rng = random.Random(seed)
    prefixes = [random_tokens(rng, token_ids, prefix_len) for _ in range(num_prefixes)]
    requests = [
        BenchRequest(prefixes[index % num_prefixes] + random_tokens(rng, token_ids, suffix_len), output_len)
        for index in range(num_prompts)
    ]
    rng.shuffle(requests)
    return requests


# --- ShareGPT-shaped JSON -----------------------------------------------------------------------------------


def read_sharegpt(path: str | Path) -> list[tuple[str, str]]:
    """(first message, second message) of every conversation that has both.

    The file is a JSON list of {"conversations": [{"from": ..., "value": ...}, ...]}. Raises `InvalidParameterError`
    naming the file and the entry when it is anything else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidParameterError("dataset_path", f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidParameterError("dataset_path", f"{path} is not JSON: {error}") from error
    if not isinstance(data, list):
        raise InvalidParameterError("dataset_path", f"{path} must hold a JSON list, not {type(data).__name__}")
    turns = [_conversation(path, index, entry) for index, entry in enumerate(data)]
    return [(values[0], values[1]) for values in turns if len(values) >= 2]


def _conversation(path: str | Path, index: int, entry: Any) -> list[str]:
    conversation = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(conversation, list):
        raise InvalidParameterError("dataset_path", f'{path}: entry {index} has no list "conversations"')
    values = []
    for turn, message in enumerate(conversation[:2]):
        value = message.get("value") if isinstance(message, dict) else None
        if not isinstance(value, str):
            raise InvalidParameterError(
                "dataset_path", f'{path}: entry {index}, message {turn} of "conversations" has no text "value"'
            )
        values.append(value)
    return values


def length_problem(prompt_len: int, output_len: int, max_total_len: int, *, check_output_len: bool) -> str | None:
    """Why a conversation is left out by vLLM's rules; None when it is used.

    check_output_len: False when the caller set the output length, which then may be short.
    """
    if prompt_len < MIN_TOKENS:
        return f"prompt shorter than {MIN_TOKENS} tokens"
    if check_output_len and output_len < MIN_TOKENS:
        return f"answer shorter than {MIN_TOKENS} tokens"
    if prompt_len > MAX_PROMPT_TOKENS:
        return f"prompt longer than {MAX_PROMPT_TOKENS} tokens"
    if prompt_len + output_len > max_total_len:
        return f"prompt and answer longer than {max_total_len} tokens"
    return None


@dataclass(frozen=True)
class ShareGPTSample:
    """The requests that were taken, and how many conversations were left out for which reason."""

    requests: list[BenchRequest]
    left_out: dict[str, int]


def sharegpt_requests(
    conversations: Sequence[tuple[str, str]],
    num_prompts: int,
    encode: Callable[[str], list[int]],
    *,
    output_len: int | None = None,
    max_model_len: int,
    seed: int = 0,
) -> ShareGPTSample:
    """Up to `num_prompts` requests from shuffled conversations: prompt and length of the answer.

    output_len: generate this many instead of the answer's length. Conversations are tokenised only until enough are
    found, and never used twice: a repeated prompt would measure the prefix cache.
    """
    _require_at_least("num_prompts", num_prompts, 1)
    if output_len is not None:
        _require_at_least("output_len", output_len, 1)
    shuffled = list(conversations)
    random.Random(seed).shuffle(shuffled)
    max_total_len = min(MAX_TOTAL_TOKENS, max_model_len)
    requests: list[BenchRequest] = []
    left_out: Counter[str] = Counter()
    for prompt, answer in shuffled:
        if len(requests) == num_prompts:
            break
        prompt_ids = encode(prompt)
        wanted = len(encode(answer)) if output_len is None else output_len
        problem = length_problem(len(prompt_ids), wanted, max_total_len, check_output_len=output_len is None)
        if problem is None:
            requests.append(BenchRequest(prompt_ids, wanted))
        else:
            left_out[problem] += 1
    if not requests:
        reasons = "; ".join(f"{count} x {why}" for why, count in left_out.items()) or "none has two messages"
        raise InvalidParameterError("dataset_path", f"no conversation can be used: {reasons}")
    return ShareGPTSample(requests, dict(left_out))


def _require_at_least(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidParameterError(name, f"must be an integer of at least {minimum}, got {value!r}")
