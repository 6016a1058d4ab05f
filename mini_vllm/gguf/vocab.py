"""The vocabulary as a GGUF file lists it: tokens, what kind each is, which ids have a role.

Read by the config (which ids end a sequence) and by the tokenizer. Ids outside the token list are `CheckpointError`s.
"""

from mini_vllm.gguf.metadata import Metadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens in tokenizer.ggml.token_type."""

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TEXTS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""Control tokens that end a turn in chat models; files made before there was a key for them do not say so."""


def token_texts(metadata: Metadata) -> list[str]:
    """Every token's text by id, without the unused ones at the end that only pad the embedding."""
    tokens = metadata.items("tokenizer.ggml.tokens", str)
    kinds = token_kinds(metadata, len(tokens))
    count = len(tokens)
    while count and kinds[count - 1] == UNUSED:
        count -= 1
    return tokens[:count]


def token_kinds(metadata: Metadata, count: int) -> list[int]:
    """The kind of each token; all are normal in files that do not say."""
    kinds = metadata.items("tokenizer.ggml.token_type", int, default=[NORMAL] * count)
    if len(kinds) != count:
        raise metadata.fail("tokenizer.ggml.token_type", f"has {len(kinds)} entries for {count} tokens")
    return kinds


def token_id(metadata: Metadata, role: str) -> int | None:
    """The id in `tokenizer.ggml.{role}_token_id`, such as role 'bos'; None if the file names none."""
    key = f"tokenizer.ggml.{role}_token_id"
    if metadata.get(key) is None:
        return None
    value = metadata.integer(key, minimum=0)
    count = len(metadata.items("tokenizer.ggml.tokens", str, default=[]))
    if count and value >= count:
        raise metadata.fail(key, f"= {value} is outside the {count} tokens of the file")
    return value


def end_token_ids(metadata: Metadata) -> list[int]:
    """Every id that ends a sequence: end of text, of turn, of message."""
    named = [found for key in _END_KEYS if (found := token_id(metadata, key.removesuffix("_token_id"))) is not None]
    if token_id(metadata, "eot") is None:
        named += _turn_ends(metadata)
    return list(dict.fromkeys(named))


def _turn_ends(metadata: Metadata) -> list[int]:
    tokens = metadata.items("tokenizer.ggml.tokens", str, default=[])
    kinds = token_kinds(metadata, len(tokens))
    return [i for i, text in enumerate(tokens) if text in _END_TEXTS and kinds[i] == CONTROL]
