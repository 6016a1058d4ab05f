"""`mini-vllm generate`: complete prompts, or answer them as a chat, and print the text."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mini_vllm.entrypoints.cli.arguments import (
    HelpFormatter,
    add_engine_arguments,
    engine_args_from,
    read_text_file,
)
from mini_vllm.entrypoints.cli.sampling_arguments import (
    LOGPROB_FLAGS,
    add_sampling_arguments,
    sampling_params_from,
    spelt,
)
from mini_vllm.exceptions import ConfigError, InvalidParameterError
from mini_vllm.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from mini_vllm.engine.input_processor import TokenizedPrompt
    from mini_vllm.engine.llm_engine import LLMEngine
    from mini_vllm.outputs import CompletionOutput, LogprobsAtPosition, RequestOutput

_EXAMPLES = """\
examples:
  mini-vllm generate --prompt 'def fib(n):' --max-tokens 64
  mini-vllm generate --model DIR --prompt 'One' --prompt 'Two' --temperature 0
  mini-vllm generate --prompt 'class Queue:' --n 3 --sampling-seed 0 --min-p 0.1 --stop 'class '
  mini-vllm generate --prompt 'import os' --temperature 0 --logprobs 5 --json
  mini-vllm generate --model DIR --chat --system 'Be brief.' --prompt 'What is paging?'
  mini-vllm generate --prompt-file a.txt --prompt-file b.txt --json > completions.jsonl
  cat notes.txt | mini-vllm generate --model DIR --max-model-len 16k
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="complete prompts and print the text",
        description="Complete prompts, all of them at once, and print the text in the order of the prompts.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("prompts and output")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="A prompt; may be repeated.")
    group.add_argument(
        "--prompt-file", action="append", default=[], metavar="FILE",
        help="A file whose whole text is a prompt; may be repeated; - is standard input, less its last newline.",
    )  # fmt: skip
    group.add_argument(
        "--chat", action="store_true", help="Each prompt is a user's message, through the chat template."
    )
    group.add_argument("--system", metavar="TEXT", help="System message of every chat.")
    group.add_argument("--chat-template", metavar="FILE", help="A Jinja file in place of the model's own template.")
    group.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=None,
        help="Print text as it is made. Default: when standard output is a terminal.",
    )  # fmt: skip
    group.add_argument(
        "--json", action="store_true", help="Print one JSON object a line for each completion, when all are done."
    )
    add_sampling_arguments(parser, max_tokens=128)
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json and args.stream:
        raise ConfigError("stream: cannot be combined with --json, which prints whole completions")
    for name in LOGPROB_FLAGS:
        if hasattr(args, name) and not args.json:
            raise ConfigError(f"{name}: {spelt(name)} needs --json, since plain text has no place for numbers")
    if (args.system is not None or args.chat_template is not None) and not args.chat:
        raise ConfigError("system, chat_template: need --chat")
    texts = list(_prompt_texts(args))
    engine_args = engine_args_from(args)
    template = read_text_file(args.chat_template, "chat_template") if args.chat_template else None

    from mini_vllm.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(engine_args)
    try:
        prompts = _tokenized(engine, texts, args, template)
        if args.json or not (sys.stdout.isatty() if args.stream is None else args.stream):
            outputs = _generate(engine, prompts, args)
            _print_outputs(texts, outputs, as_json=args.json)
        else:
            outputs = _stream(engine, texts, prompts, args)
        return _report_failures(outputs)
    finally:
        engine.shutdown()


def _prompt_texts(args: argparse.Namespace) -> Iterator[str]:
    """The prompts in the order: --prompt, --prompt-file, else standard input."""
    yield from args.prompt
    for path in args.prompt_file:
        yield _standard_input() if path == "-" else read_text_file(path, "prompt_file")
    if not args.prompt and not args.prompt_file:
        if sys.stdin.isatty():
            raise InvalidParameterError(
                "prompt", "give one with --prompt TEXT, --prompt-file FILE or on standard input"
            )
        yield _standard_input()


def _standard_input() -> str:
    """All of it, without the one newline that shells and editors end it with."""
    return sys.stdin.read().removesuffix("\n")


def _tokenized(
    engine: "LLMEngine", texts: list[str], args: argparse.Namespace, template: str | None
) -> "list[TokenizedPrompt]":
    if not args.chat:
        return engine.input_processor.tokenize(texts)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    tokenizer = engine.get_tokenizer()
    rendered = [
        tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": text}],
            chat_template=template, add_generation_prompt=True, tokenize=False,
        )
        for text in texts
    ]  # fmt: skip
    return engine.input_processor.tokenize(rendered, add_special_tokens=False)


def _add_all(
    engine: "LLMEngine", prompts: "list[TokenizedPrompt]", args: argparse.Namespace, kind: RequestOutputKind
) -> None:
    params = sampling_params_from(args, engine.get_default_sampling_params(), output_kind=kind)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)


def _generate(engine: "LLMEngine", prompts: "list[TokenizedPrompt]", args: argparse.Namespace) -> "list[RequestOutput]":
    _add_all(engine, prompts, args, RequestOutputKind.FINAL_ONLY)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        outputs.update((output.request_id, output) for output in engine.step())
    return [outputs[str(index)] for index in range(len(prompts))]


def _print_outputs(texts: list[str], outputs: "list[RequestOutput]", *, as_json: bool) -> None:
    for index, (text, output) in enumerate(zip(texts, outputs, strict=True)):
        for completion in output.outputs:
            if as_json:
                print(json.dumps(_as_dict(text, output, completion), ensure_ascii=False))
            else:
                _print_heading(text, (index, len(outputs)), (completion.index, len(output.outputs)))
                print(completion.text)


def _print_heading(text: str, prompt: tuple[int, int], sample: tuple[int, int]) -> None:
    """Which of several prompts, and of several samples, the text that follows belongs to: (index, how many)."""
    parts = [f"{prompt[0] + 1} of {prompt[1]}"] if prompt[1] > 1 else []
    parts += [f"sample {sample[0] + 1} of {sample[1]}"] if sample[1] > 1 else []
    if parts:
        print(f"{'' if prompt[0] == sample[0] == 0 else chr(10)}--- {', '.join(parts)}: {text!r}", flush=True)


def _as_dict(text: str, output: "RequestOutput", completion: "CompletionOutput") -> dict[str, Any]:
    fields = {
        "prompt": text,
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "error": output.error,
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(completion.token_ids),
            "cached_tokens": output.num_cached_tokens,
        },
    }
    if completion.logprobs is not None:
        fields["cumulative_logprob"] = completion.cumulative_logprob
        fields["logprobs"] = [_as_list(position) for position in completion.logprobs]
    if output.prompt_logprobs is not None:
        fields["prompt_logprobs"] = [position and _as_list(position) for position in output.prompt_logprobs]
    return fields


def _as_list(position: "LogprobsAtPosition") -> list[dict[str, Any]]:
    """A position's own token first. What cannot be sampled at all has no number in JSON: null."""
    return [
        {
            "token_id": token_id,
            "token": entry.decoded_token,
            "logprob": entry.logprob if math.isfinite(entry.logprob) else None,
            "rank": entry.rank,
        }
        for token_id, entry in position.items()
    ]


def _stream(
    engine: "LLMEngine", texts: list[str], prompts: "list[TokenizedPrompt]", args: argparse.Namespace
) -> "list[RequestOutput]":
    """Print the first unfinished text as it is made; the others run meanwhile and follow at once."""
    _add_all(engine, prompts, args, RequestOutputKind.DELTA)
    n = getattr(args, "n", 1)
    waiting = ["" for _ in range(len(prompts) * n)]
    done = [False for _ in waiting]
    last: dict[int, RequestOutput] = {}
    shown = -1
    while len(last) < len(prompts):
        for output in engine.step():
            index = int(output.request_id)
            for completion in output.outputs:
                waiting[index * n + completion.index] += completion.text
                done[index * n + completion.index] |= completion.finished()
            if output.finished:
                last[index] = output
        while shown < len(waiting) and (shown < 0 or _print_new(waiting, shown, done[shown])):
            shown += 1
            if shown < len(waiting):
                _print_heading(texts[shown // n], (shown // n, len(prompts)), (shown % n, n))
    return [last[index] for index in range(len(prompts))]


def _print_new(waiting: list[str], index: int, done: bool) -> bool:
    """Print what has gathered of one text; True when it is finished."""
    sys.stdout.write(waiting[index] + ("\n" if done else ""))
    sys.stdout.flush()
    waiting[index] = ""
    return done


def _report_failures(outputs: "list[RequestOutput]") -> int:
    failed = [output for output in outputs if output.error is not None]
    for output in failed:
        print(f"mini-vllm: error: prompt {int(output.request_id) + 1}: {output.error}", file=sys.stderr)
    return 1 if failed else 0
