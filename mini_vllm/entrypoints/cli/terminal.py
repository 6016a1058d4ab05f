"""The terminal side of `chat` and `complete`: reading what is typed or pasted, showing an answer as it comes.

Control codes are written to terminals only. Text of a model is shown without those it may hold: an answer must not be
able to move the cursor or change the title of the window.
"""

import contextlib
import select
import sys
from collections.abc import Callable
from typing import Any, Protocol

from mini_vllm.entrypoints.cli.answering import Answer

_PASTE_SECONDS = 0.03
"""Lines that come this soon after one another were pasted, not typed."""
_QUOTES = '"""'
_UNSAFE = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}


def safe_text(text: str) -> str:
    """`text` without control characters other than newline and tab."""
    return text.translate(_UNSAFE)


# --- reading --------------------------------------------------------------------------------------------------


class Typist:
    """Reads one message at a time from a terminal, with history; of several lines when they are pasted or quoted.

    Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C.
    """

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        with contextlib.suppress(ImportError):  # Windows has none; then there are no arrow keys
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")

    def read(self) -> str:
        line = input(self._shown(self._prompt))
        if line.lstrip().startswith(_QUOTES):
            return self._quoted(line.lstrip().removeprefix(_QUOTES))
        lines = [line]
        while _more_is_there():
            lines.append(input())
        return "\n".join(lines).strip("\n")

    def _quoted(self, first: str) -> str:
        lines = [first]
        while not lines[-1].rstrip().endswith(_QUOTES):
            lines.append(input(self._shown("... ")))
        lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
        return "\n".join(lines).strip("\n")

    def _shown(self, prompt: str) -> str:
        """The prompt, for `input` to show; on standard error when the answers go to a file."""
        if sys.stdout.isatty():
            return prompt
        print(prompt, end="", file=sys.stderr, flush=True)
        return ""


def _more_is_there() -> bool:
    try:
        return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])
    except (OSError, ValueError):
        return False


# --- showing --------------------------------------------------------------------------------------------------


class Printer(Protocol):
    """Shows one answer."""

    def add(self, text: str) -> None: ...

    def finish(self) -> None: ...


class PlainPrinter:
    """Text as it comes, and a newline at the end if it lacks one."""

    def __init__(self) -> None:
        self._last = ""
        self._is_terminal = sys.stdout.isatty()

    def add(self, text: str) -> None:
        shown = safe_text(text) if self._is_terminal else text
        if shown:
            sys.stdout.write(shown)
            sys.stdout.flush()
            self._last = shown[-1]

    def finish(self) -> None:
        if self._last != "\n":
            sys.stdout.write("\n")
            sys.stdout.flush()


class MarkdownPrinter:
    """The end of the text, rendered, while it comes; the whole text when it is there."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._text = ""
        self._console = Console()
        self._live = Live(console=self._console, transient=True, refresh_per_second=8)
        self._live.start()

    def add(self, text: str) -> None:
        from rich.markdown import Markdown

        self._text += safe_text(text)
        room = max(self._console.height - 2, 1)
        self._live.update(Markdown("\n".join(self._text.splitlines()[-room:])))

    def finish(self) -> None:
        from rich.markdown import Markdown

        self._live.update("")
        self._live.stop()
        self._console.print(Markdown(self._text))


def show(answer: Answer, printer: Printer) -> tuple[str, bool]:
    """(the text, whether Ctrl-C cut it short). The request is ended in any case."""
    parts: list[str] = []
    interrupted = False
    try:
        for text in answer:
            parts.append(text)
            printer.add(text)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        answer.close()
        printer.finish()
    return "".join(parts), interrupted


def stats_line(answer: Answer) -> str:
    """TTFT, speed and tokens of an answer."""
    usage, ttft = answer.usage, answer.time_to_first_token
    parts = [] if ttft is None else [f"TTFT {ttft * 1e3:.0f} ms"]
    if usage is not None:
        after_first = answer.seconds - (ttft or 0.0)
        if usage.completion_tokens > 1 and after_first > 0:
            parts.append(f"{(usage.completion_tokens - 1) / after_first:.1f} tokens/s")
        parts.append(f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached)")
        parts.append(f"{usage.completion_tokens} generated")
    parts.append(f"{answer.seconds:.2f} s")
    return "[" + ", ".join(parts) + "]"


def note(line: str) -> None:
    """A line that is no part of the answer: on standard error, dimmed on a terminal."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{dim}{line}{plain}", file=sys.stderr, flush=True)


def printer_for(markdown: bool) -> Callable[[], Any]:
    """What shows answers: rendered only on a terminal."""
    return MarkdownPrinter if markdown and sys.stdout.isatty() else PlainPrinter
