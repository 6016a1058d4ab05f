"""A command on a pseudo-terminal, for tests: what a person types, what they see."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


class Terminal:
    def __init__(self, process: "subprocess.Popen[bytes]", master: int) -> None:
        self.process = process
        self._master = master
        self.raw = ""
        self._seen = 0

    @property
    def text(self) -> str:
        """Everything that was shown, without control codes."""
        return CONTROL.sub("", self.raw)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str, timeout: float = 30) -> str:
        """Wait until `text` is shown, after what was expected before; returns what came up to it."""
        deadline = time.monotonic() + timeout
        while text not in self.text[self._seen :]:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{text!r} was not shown; what was: {self.text[self._seen :]!r}")
        start = self._seen
        self._seen = self.text.index(text, start) + len(text)
        return self.text[start : self._seen]

    def ended(self, timeout: float = 30) -> int:
        """Wait for its end; returns the status."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(timeout)

    def interrupt(self, shows: str) -> None:
        """Ctrl-C at the prompt until `shows` appears: one that comes before readline waits is seen at the next key."""
        for _ in range(30):
            self.type("\x03")
            with suppress(AssertionError):
                self.expect(shows, timeout=1)
                return
        raise AssertionError(f"Ctrl-C did not show {shows!r}")

    def _read(self, timeout: float) -> bool:
        if not select.select([self._master], [], [], max(timeout, 0))[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux says so when the other side is closed
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)


@contextmanager
def terminal(*args: str) -> Iterator[Terminal]:
    """`mini-vllm ARGS` with a terminal for input, output and errors; killed in the end."""
    master, slave = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mini_vllm", *args], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment,
        start_new_session=True, preexec_fn=_own_the_terminal,
    )  # fmt: skip
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        os.close(master)


def _own_the_terminal() -> None:
    """So that Ctrl-C typed into it is a signal for this process, even if whoever runs the tests ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
