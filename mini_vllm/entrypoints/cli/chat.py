"""`mini-vllm chat`: talk to a model, a server's (--url) or one in this process."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mini_vllm.entrypoints.cli.answering import (
    Answerer,
    ContextFullError,
    Message,
    add_answerer_arguments,
    answerer_from,
)
from mini_vllm.entrypoints.cli.arguments import HelpFormatter
from mini_vllm.entrypoints.cli.terminal import Typist, note, printer_for, show, stats_line
from mini_vllm.exceptions import InvalidParameterError, MiniVLLMError

_EXAMPLES = """\
examples:
  mini-vllm chat --url http://localhost:8000/v1                 the model of a server
  mini-vllm chat DIR --system-prompt 'Be brief.' --stats        a model in this process
  mini-vllm chat --url http://localhost:8000 -q 'What is paging?' > answer.txt
  cat notes.txt | mini-vllm chat DIR --max-tokens 200           all of the input is one message

Ctrl-C stops an answer, Ctrl-D ends the chat. Paste several lines, or put them between triple quotes.
"""
_HELP = """\
/help            this
/reset           forget the conversation, but for the system prompt
/system [TEXT]   change the system prompt (none without TEXT) and forget the conversation
/retry           answer the last message again
/save FILE       write the conversation as JSON messages
/exit            end the chat, as Ctrl-D does
\"\"\"              begins and ends a message of several lines"""
_FULL = (
    "The conversation no longer fits the model's context. /reset forgets it; a smaller --max-tokens leaves more room "
    "for it; a larger --max-model-len (where the model's own limit allows) makes more."
)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model, of a server or in this process",
        description="Talk to a model. In process, an answer takes at most a quarter of the context unless --max-tokens "
        "says otherwise; on a server, what is left of it.",
        usage="mini-vllm chat [MODEL] [options]",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("chat")
    group.add_argument("-q", "--quick", metavar="TEXT", help="Send this one message, print the answer and end.")
    group.add_argument("--system-prompt", metavar="TEXT", help="How the model shall behave.")
    group.add_argument("--chat-template", metavar="FILE", help="In process: a Jinja file in place of the model's own.")
    group.add_argument("--stats", action="store_true", help="After each answer: TTFT, tokens/s, tokens, cached tokens.")
    group.add_argument(
        "--markdown", action=argparse.BooleanOptionalAction, default=True, help="Render answers on a terminal."
    )
    add_answerer_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    message = args.quick
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
    if message is not None and not message:
        raise InvalidParameterError("quick", "there is no message: give one with -q TEXT or on standard input")
    answerer = answerer_from(args)
    try:
        chat = Chat(answerer, args.system_prompt, stats=args.stats, printer=printer_for(args.markdown))
        if message is not None:
            return 130 if chat.ask(message) else 0
        note(f"{answerer.name}: /help lists commands, Ctrl-D ends.")
        return _converse(chat)
    finally:
        answerer.close()


def _converse(chat: "Chat") -> int:
    typist = Typist("> ")
    while True:
        try:
            message = typist.read()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            note("Ctrl-D ends the chat.")
            continue
        try:
            if message.startswith("/"):
                if chat.command(message):
                    return 0
            elif message.strip():
                chat.ask(message.strip())
        except ContextFullError as error:
            note(f"error: {error}\n{_FULL}")
        except (MiniVLLMError, OSError) as error:
            note(f"error: {error}")


class Chat:
    """A conversation. printer: makes what shows one answer."""

    def __init__(
        self, answerer: Answerer, system_prompt: str | None, *, stats: bool, printer: Callable[[], Any]
    ) -> None:
        self._answerer, self._stats, self._printer = answerer, stats, printer
        self.messages: list[Message] = []
        self._begin(system_prompt)

    def _begin(self, system_prompt: str | None) -> None:
        self._system = system_prompt
        self.messages = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def ask(self, message: str) -> bool:
        """Answer, and remember both; True when Ctrl-C cut the answer short.

        A message that could not be answered at all is forgotten. What came of a stopped answer stays: it was read.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": message})
        text = ""
        try:
            answer = self._answerer.chat(self.messages)
            text, interrupted = show(answer, self._printer())
        finally:
            self.messages = [*self.messages, {"role": "assistant", "content": text}] if text else before
        if interrupted:
            note("stopped")
        elif answer.finish_reason == "length":
            note("(cut off: the limit of tokens was reached)")
        if self._stats:
            note(stats_line(answer))
        return interrupted

    # -- commands --------------------------------------------------------------------------------------------

    def command(self, line: str) -> bool:
        """Do what a line that begins with / says; True when it ends the chat."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit"):
            return True
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda rest: note(_HELP),
            "/reset": lambda rest: self._reset(self._system),
            "/system": lambda rest: self._reset(rest or None),
            "/retry": lambda rest: self._retry(),
            "/save": self._save,
        }
        if name not in commands:
            note(f"{name} is no command; /help lists them. A message cannot begin with /: put a space before it.")
        else:
            commands[name](rest.strip())
        return False

    def _reset(self, system_prompt: str | None) -> None:
        self._begin(system_prompt)
        note("the conversation begins anew" + (f"; system prompt: {system_prompt}" if system_prompt else ""))

    def _retry(self) -> None:
        asked = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            note("nothing was asked yet")
            return
        message = self.messages[asked[-1]]["content"]
        self.messages = self.messages[: asked[-1]]
        self.ask(message)

    def _save(self, path: str) -> None:
        if not path:
            note("/save needs a file's name")
            return
        target = Path(path).expanduser()
        target.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        note(f"{len(self.messages)} messages written to {target}")
