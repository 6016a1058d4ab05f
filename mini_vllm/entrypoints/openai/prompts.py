"""Text and token ids become checked prompts, cut to size where the request wants that.

These functions work on text for as long as a prompt is long: they run off the event loop, in `engine.run_text_work`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mini_vllm.engine.input_processor import InputProcessor, TokenizedPrompt
from mini_vllm.entrypoints.openai.completion_request import OnePrompt
from mini_vllm.entrypoints.openai.sampling_request import SamplingRequest
from mini_vllm.exceptions import InvalidParameterError


@dataclass(frozen=True)
class Truncation:
    """Keep `num_tokens` of a longer prompt: its end or (side 'right' is cut off) its beginning."""

    num_tokens: int
    side: str = "left"

    def cut(self, ids: list[int]) -> list[int]:
        return ids[-self.num_tokens :] if self.side == "left" else ids[: self.num_tokens]


def truncation_of(body: SamplingRequest, num_output_tokens: int, max_model_len: int) -> Truncation | None:
    """What the body asks for. num_output_tokens: what -1 leaves room for."""
    asked = body.truncate_prompt_tokens
    if asked is None:
        if body.truncation_side is not None:
            raise InvalidParameterError("truncation_side", "acts only with `truncate_prompt_tokens`")
        return None
    if asked == 0 or asked < -1:
        raise InvalidParameterError("truncate_prompt_tokens", f"must be -1 or at least 1, got {asked}")
    if asked > max_model_len:
        raise InvalidParameterError(
            "truncate_prompt_tokens", f"value ({asked}) is greater than max_model_len ({max_model_len})"
        )
    kept = max(max_model_len - num_output_tokens, 1) if asked == -1 else asked
    return Truncation(kept, body.truncation_side or "left")


def tokenized(
    processor: InputProcessor,
    prompts: Sequence[OnePrompt],
    *,
    add_special_tokens: bool = True,
    truncation: Truncation | None = None,
) -> list[TokenizedPrompt]:
    """Raises `InvalidParameterError` or `PromptTooLongError`; in a batch, saying which prompt."""
    if truncation is None:
        return processor.tokenize(prompts, add_special_tokens)
    tokenizer = processor.tokenizer
    whole = [tokenizer.encode(p, add_special_tokens) if isinstance(p, str) else p for p in prompts]
    kept = [truncation.cut(ids) for ids in whole]
    checked = processor.tokenize(kept)
    for prompt, ids, source in zip(checked, whole, prompts, strict=True):
        if isinstance(source, str) and len(ids) == len(prompt.token_ids):
            prompt.text = source
    return checked
