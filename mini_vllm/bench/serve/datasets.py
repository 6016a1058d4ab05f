"""What is asked of a server: prompts as text (or token ids), how much to generate, and for traces when.

Token lists come from `bench.datasets`, as for the other benchmarks; here they become text that a server's tokenizer
reads back as just as many tokens. Files: ShareGPT conversations, JSON lines of prompts, and traces of arrivals, ours
(`serve --record-trace`) or Mooncake's.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_vllm.bench.datasets import (
    prefix_repetition_requests,
    random_requests,
    random_tokens,
    read_sharegpt,
    sharegpt_requests,
)
from mini_vllm.bench.serve.options import ServeOptions
from mini_vllm.engine.request_trace import TracedRequest, read_request_trace
from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.text.tokenizer import Tokenizer

_ATTEMPTS = 10
"""Times a random text is put right before its length is taken as it is."""


@dataclass(frozen=True)
class ServeRequest:
    """prompt_len: tokens as this tokenizer counts them, without what a template or the server adds.

    arrival: seconds after the start, where the dataset says so.
    """

    prompt: str | list[int]
    prompt_len: int
    output_len: int
    arrival: float | None = None


def usable_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that stand for whole characters, so that texts made of them are read back as about as many tokens."""
    special = set(tokenizer.all_special_ids)
    ids = [token_id for token_id in range(tokenizer.vocab_size) if token_id not in special]
    return [token_id for token_id in ids if (text := tokenizer.decode(token_id)) and "�" not in text] or ids


def text_of_length(tokenizer: Tokenizer, ids: Sequence[int], usable: Sequence[int], rng: random.Random) -> ServeRequest:
    """A text that begins as `ids` do and is read back as len(ids) tokens, or as near as a few attempts come.

    Neighbouring tokens may merge when a text is read, so it is cut or filled up at its end and read again.
    """
    wanted, current = len(ids), list(ids)
    best, best_len = "", -1
    for _ in range(_ATTEMPTS):
        text = tokenizer.decode(current)
        read = tokenizer.encode(text, add_special_tokens=False)
        if best_len < 0 or abs(len(read) - wanted) < abs(best_len - wanted):
            best, best_len = text, len(read)
        if len(read) == wanted:
            break
        current = read[:wanted] + random_tokens(rng, usable, max(wanted - len(read), 0))
    return ServeRequest(best, best_len, 0)


@dataclass(frozen=True)
class RequestMaker:
    """Makes the requests that the options ask for; the same options give the same requests."""

    options: ServeOptions
    tokenizer: Tokenizer

    def requests(self) -> tuple[list[ServeRequest], dict[str, int]]:
        """(the requests that are measured, what of a file was left out by reason)."""
        return self._made(self.options.num_prompts, self.options.seed)

    def warmups(self, measured: Sequence[ServeRequest]) -> list[ServeRequest]:
        """Requests to send before: at least one, to see that the server answers.

        Random prompts are drawn afresh, so that they leave nothing useful in the server's prefix cache; of a file the
        first prompts are taken.
        """
        count = max(self.options.num_warmups, 1)
        if self.options.dataset_name == "random":
            return self._made(count, self.options.seed + 0x5EED)[0]
        return [measured[index % len(measured)] for index in range(count)]

    def _made(self, count: int, seed: int) -> tuple[list[ServeRequest], dict[str, int]]:
        name, settings = self.options.dataset_name, self.options.dataset_settings()
        if name == "sharegpt":
            return self._sharegpt(count, seed, settings)
        if name == "custom":
            return self._custom(count, seed, settings["custom_output_len"]), {}
        if name == "timed_trace":
            return self._trace(count, seed, settings["timed_trace_speed"]), {}
        make: Any = random_requests if name == "random" else prefix_repetition_requests
        keywords = {key.removeprefix(f"{name}_"): value for key, value in settings.items()}
        usable, rng = usable_token_ids(self.tokenizer), random.Random(seed)
        made = make(count, usable, seed=seed, **keywords)
        return [self._from_ids(one.prompt_token_ids, one.output_len, usable, rng) for one in made], {}

    def _from_ids(
        self, ids: list[int], output_len: int, usable: Sequence[int], rng: random.Random, arrival: float | None = None
    ) -> ServeRequest:
        if self.options.prompt_token_ids:
            return ServeRequest(ids, len(ids), output_len, arrival)
        made = text_of_length(self.tokenizer, ids, usable, rng)
        return ServeRequest(made.prompt, made.prompt_len, output_len, arrival)

    def _from_text(self, text: str, output_len: int) -> ServeRequest:
        ids = self.tokenizer.encode(text)
        return ServeRequest(ids if self.options.prompt_token_ids else text, len(ids), output_len)

    def _sharegpt(self, count: int, seed: int, settings: dict[str, Any]) -> tuple[list[ServeRequest], dict[str, int]]:
        texts: dict[tuple[int, ...], str] = {}

        def encode(text: str) -> list[int]:
            ids = self.tokenizer.encode(text)
            texts[tuple(ids)] = text
            return ids

        sample = sharegpt_requests(
            read_sharegpt(str(self.options.dataset_path)), count, encode,
            output_len=settings["sharegpt_output_len"], max_model_len=1 << 30, seed=seed,
        )  # fmt: skip
        if self.options.prompt_token_ids:
            made = [ServeRequest(one.prompt_token_ids, len(one.prompt_token_ids), one.output_len)
                    for one in sample.requests]  # fmt: skip
        else:
            made = [
                ServeRequest(texts[tuple(one.prompt_token_ids)], len(one.prompt_token_ids), one.output_len)
                for one in sample.requests
            ]
        return made, sample.left_out

    def _custom(self, count: int, seed: int, output_len: int) -> list[ServeRequest]:
        """Lines of {"prompt": TEXT, "output_tokens": N}; the number is used when `output_len` is -1."""
        lines = list(read_json_lines(str(self.options.dataset_path)))
        if not self.options.disable_shuffle:
            random.Random(seed).shuffle(lines)
        return [self._custom_request(where, line, output_len) for where, line in lines[:count]]

    def _custom_request(self, where: str, line: dict[str, Any], output_len: int) -> ServeRequest:
        prompt = line.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise InvalidParameterError("dataset_path", f'{where} has no text "prompt"')
        if output_len == -1:
            return self._from_text(prompt, _whole_number(where, line, "output_tokens", 1))
        return self._from_text(prompt, output_len)

    # -- traces ----------------------------------------------------------------------------------------------

    def _trace(self, count: int, seed: int, speed: float) -> list[ServeRequest]:
        """The first `count` requests of a trace. One that never got a token asks for one."""
        usable, entries = usable_token_ids(self.tokenizer), read_request_trace(str(self.options.dataset_path))
        if not entries:
            raise InvalidParameterError("dataset_path", f"{self.options.dataset_path} holds no request")
        requests = []
        for index, entry in enumerate(entries[:count]):
            rng = random.Random(f"{seed}/{index}")
            arrival = (entry.timestamp - entries[0].timestamp) / 1e3 / speed
            ids = _trace_prompt(entry, seed, usable)
            requests.append(self._from_ids(ids, max(entry.output_length, 1), usable, rng, arrival))
        return requests


def _trace_prompt(entry: TracedRequest, seed: int, usable: Sequence[int]) -> list[int]:
    """Each hash id always gives the same block of tokens, so prompts share what they shared when they were recorded."""
    ids: list[int] = []
    for hash_id in entry.hash_ids:
        ids += random_tokens(random.Random(f"{seed}:{hash_id}"), usable, entry.block_size)
    return ids[: entry.input_length]


def read_json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """('FILE line N', the object) of every line that is not blank. Raises `InvalidParameterError`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameterError("dataset_path", f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidParameterError("dataset_path", f"{where} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InvalidParameterError("dataset_path", f"{where} is not a JSON object")
        yield where, value


def _whole_number(where: str, line: dict[str, Any], name: str, least: int) -> int:
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidParameterError("dataset_path", f'{where}: "{name}" must be a whole number of at least {least}')
    return value
