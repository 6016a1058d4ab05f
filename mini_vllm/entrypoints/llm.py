"""The offline API: prompts in, finished outputs out, in the order of the prompts.

`LLM` is handed the arguments of `EngineArgs` and drives an `LLMEngine` until everything asked for is done. It
promises that a call either returns all its outputs or, when anything goes wrong, leaves no request behind.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.outputs import BeamSearchOutput, RequestOutput
from mini_vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from mini_vllm.engine.input_processor import PromptType, TokenizedPrompt
    from mini_vllm.text.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]
ParamsType = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model that completes prompts, in this process.

    model: folder with config.json, weights and tokenizer.json; None is the bundled model. The other arguments are
    those of `EngineArgs` (vLLM's names and defaults); an unknown one raises `ConfigError` with the nearest valid name.
    Throughput is not logged unless disable_log_stats=False: the progress bar shows it.
    """

    def __init__(self, model: str | None = None, **engine_args: Any) -> None:
        from mini_vllm.engine.arg_utils import EngineArgs
        from mini_vllm.engine.llm_engine import LLMEngine

        args = EngineArgs.from_kwargs(**{"model": model, "disable_log_stats": True} | engine_args)
        self.llm_engine = LLMEngine.from_engine_args(args)
        self._request_ids = itertools.count()

    # -- completion -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: "PromptType | Sequence[PromptType]",
        sampling_params: ParamsType = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; outputs come in the order of the prompts.

        prompts: one or a list of: text, token ids, {"prompt": text}, {"prompt_token_ids": ids}.
        sampling_params: for all prompts, or one for each; None takes the model's own defaults.
        use_tqdm: show progress, with a bar of tqdm or of the given class.
        priority: one number for each prompt, for scheduling_policy='priority'.

        Raises `InvalidParameterError` before anything runs if any prompt or parameter is bad. A request that fails
        on its own has finish_reason 'error' and says why in `error`; the others are not disturbed.
        """
        tokenized = self.llm_engine.input_processor.tokenize(_as_prompt_list(prompts))
        return self._run(tokenized, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: ParamsType = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of {"role": ..., "content": ...}.

        chat_template: a Jinja template, or the name of one the model has; None takes the model's default.
        add_generation_prompt: open an assistant turn. continue_final_message: go on with the last message
        instead (then add_generation_prompt must be False). tools: JSON schemas the template shows to the model.
        """
        tokenizer = self.get_tokenizer()
        conversations = _as_conversation_list(messages)
        texts = [
            tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        # The template wrote the special tokens already: adding them again would give two BOS.
        tokenized = self.llm_engine.input_processor.tokenize(texts, add_special_tokens=False)
        return self._run(tokenized, sampling_params, use_tqdm, None)

    def beam_search(
        self, prompts: "PromptType | Sequence[PromptType]", params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, best first, in the order of the prompts.

        They are those of transformers' `generate(num_beams=...)` with the same length penalty and
        early_stopping=False. Beams share their prefix through the prefix cache (enable_prefix_caching).
        """
        from mini_vllm.engine.beam_search import beam_search

        return beam_search(self.llm_engine, _as_prompt_list(prompts), params)

    def _run(
        self,
        prompts: "Sequence[TokenizedPrompt]",
        sampling_params: ParamsType,
        use_tqdm: bool | Callable[..., Any],
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        params = _one_for_each("sampling_params", _final_only(sampling_params), len(prompts))
        priorities = _one_for_each("priority", 0 if priority is None else priority, len(prompts))
        request_ids = [str(next(self._request_ids)) for _ in prompts]
        engine = self.llm_engine
        added: list[str] = []
        try:
            for request_id, prompt, chosen, number in zip(request_ids, prompts, params, priorities, strict=True):
                chosen = self._default_params() if chosen is None else chosen
                engine.add_request(request_id, prompt, chosen, priority=number)
                added.append(request_id)
            outputs = self._drain(set(request_ids), use_tqdm)
        except BaseException:  # an interrupt as well: whatever is still queued or running would never be collected
            engine.abort_request(added)
            raise
        return [outputs[request_id] for request_id in request_ids]

    def _default_params(self) -> SamplingParams:
        params = self.get_default_sampling_params()
        return dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)

    def _drain(self, pending: set[str], use_tqdm: bool | Callable[..., Any]) -> dict[str, RequestOutput]:
        """Step until the pending requests are done. Requests that others added to the engine advance as well."""
        outputs: dict[str, RequestOutput] = {}
        with _Progress(len(pending), use_tqdm) as progress:
            while pending:
                for output in self.llm_engine.step():
                    if output.finished and output.request_id in pending:
                        pending.discard(output.request_id)
                        outputs[output.request_id] = output
                        progress.finished(output)
        return outputs

    # -- looking in -------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> "Tokenizer":
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What a call without sampling_params uses, from the model's generation_config.json."""
        return self.llm_engine.get_default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix."""
        return self.llm_engine.reset_prefix_cache()

    def shutdown(self) -> None:
        """Give back the model's and the cache's memory; the object cannot be used afterwards."""
        self.llm_engine.shutdown()


class _Progress:
    """A bar of finished prompts with input and output speed; nothing at all without `use_tqdm`."""

    def __init__(self, total: int, use_tqdm: bool | Callable[..., Any]) -> None:
        self.bar = None
        self.input_tokens = self.output_tokens = 0
        if use_tqdm and total:
            self.bar = _bar_class(use_tqdm)(
                total=total,
                desc="Processed prompts",
                dynamic_ncols=True,
                postfix=f"est. speed input: {0:.2f} toks/s, output: {0:.2f} toks/s",
            )

    def finished(self, output: RequestOutput) -> None:
        if self.bar is None:
            return
        self.input_tokens += len(output.prompt_token_ids)
        self.output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed = max(self.bar.format_dict["elapsed"], 1e-9)
        self.bar.postfix = (
            f"est. speed input: {self.input_tokens / elapsed:.2f} toks/s, "
            f"output: {self.output_tokens / elapsed:.2f} toks/s"
        )
        self.bar.update(1)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _bar_class(use_tqdm: bool | Callable[..., Any]) -> Callable[..., Any]:
    if callable(use_tqdm):
        return use_tqdm
    from tqdm.auto import tqdm

    return tqdm  # type: ignore[no-any-return]


def _as_prompt_list(prompts: Any) -> list[Any]:
    """One prompt or several: a list of integers is one prompt of token ids."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    from mini_vllm.engine.input_processor import is_integer

    if isinstance(prompts, bytes) or not hasattr(prompts, "__iter__"):
        raise InvalidParameterError("prompts", f"must be text, token ids, a dict, or a list, got {prompts!r}")
    items = list(prompts)
    return [items] if items and is_integer(items[0]) else items


def _as_conversation_list(messages: Any) -> list[Any]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidParameterError("messages", f"must be a list of dicts, got {type(messages).__name__}")
    if messages and isinstance(messages[0], Sequence) and not isinstance(messages[0], (str, bytes)):
        return list(messages)
    return [messages]


def _final_only(sampling_params: Any) -> Any:
    """Outputs are returned when finished, so those before the end are not built."""
    if isinstance(sampling_params, SamplingParams):
        return dataclasses.replace(sampling_params, output_kind=RequestOutputKind.FINAL_ONLY)
    if isinstance(sampling_params, Sequence) and not isinstance(sampling_params, str):
        return [_final_only(params) for params in sampling_params]
    return sampling_params


def _one_for_each(field: str, value: Any, count: int) -> list[Any]:
    """`value` for every prompt, or a list that must have one entry a prompt."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise InvalidParameterError(field, f"has {len(value)} entries for {count} prompts; give one for each, or one")
    return list(value)
