"""`mini-vllm generate`: complete prompts, or answer them as a chat, and print the text."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mini_vllm.entrypoints.cli.arguments import (
    HelpFormatter,
    add_engine_arguments,
    add_sampling_arguments,
    engine_args_from,
    read_text_file,
    sampling_params_from,
)
from mini_vllm.exceptions import ConfigError, InvalidParameterError
from mini_vllm.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from mini_vllm.engine.input_processor import TokenizedPrompt
    from mini_vllm.engine.llm_engine import LLMEngine
    from mini_vllm.outputs import RequestOutput

_EXAMPLES = """\
examples:
  mini-vllm generate --prompt 'def fib(n):' --max-tokens 64
  mini-vllm generate --model DIR --prompt 'One' --prompt 'Two' --temperature 0
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
        "--json", action="store_true", help="Print one JSON object a line for each prompt, when all are done."
    )
    add_sampling_arguments(parser, max_tokens=128)
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json and args.stream:
        raise ConfigError("stream: cannot be combined with --json, which prints whole completions")
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
    for text, output in zip(texts, outputs, strict=True):
        if as_json:
            print(json.dumps(_as_dict(text, output), ensure_ascii=False))
        else:
            _print_heading(int(output.request_id), len(outputs), text)
            print(output.outputs[0].text)


def _print_heading(index: int, total: int, text: str) -> None:
    """With several prompts, which one the text that follows belongs to."""
    if total > 1:
        print(f"{'' if index == 0 else chr(10)}--- {index + 1} of {total}: {text!r}", flush=True)


def _as_dict(text: str, output: "RequestOutput") -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "prompt": text,
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


def _stream(
    engine: "LLMEngine", texts: list[str], prompts: "list[TokenizedPrompt]", args: argparse.Namespace
) -> "list[RequestOutput]":
    """Print the first unfinished prompt's text as it is made; the others run meanwhile and follow at once."""
    _add_all(engine, prompts, args, RequestOutputKind.DELTA)
    waiting = ["" for _ in prompts]
    last: dict[int, RequestOutput] = {}
    shown = -1
    while len(last) < len(prompts):
        for output in engine.step():
            index = int(output.request_id)
            waiting[index] += output.outputs[0].text
            if output.finished:
                last[index] = output
        while shown < len(prompts) and (shown < 0 or _print_new(waiting, shown, shown in last)):
            shown += 1
            if shown < len(prompts):
                _print_heading(shown, len(prompts), texts[shown])
    return [last[index] for index in range(len(prompts))]


def _print_new(waiting: list[str], index: int, done: bool) -> bool:
    """Print what has gathered for one prompt; True when it is finished."""
    sys.stdout.write(waiting[index] + ("\n" if done else ""))
    sys.stdout.flush()
    waiting[index] = ""
    return done


def _report_failures(outputs: "list[RequestOutput]") -> int:
    failed = [output for output in outputs if output.outputs[0].finish_reason == "error"]
    for output in failed:
        print(f"mini-vllm: error: prompt {int(output.request_id) + 1}: {output.error}", file=sys.stderr)
    return 1 if failed else 0
