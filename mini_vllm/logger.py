"""One place where loggers are made, so that every line looks the same.

`MINI_VLLM_LOGGING_LEVEL` (DEBUG, INFO, WARNING, ...) sets the level; DEBUG prints the record of every step.
"""

import logging
import os
import sys

_ROOT = "mini_vllm"
_FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"


def _configure_root() -> logging.Logger:
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT, "%m-%d %H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(os.environ.get("MINI_VLLM_LOGGING_LEVEL", "INFO").upper())
    return root


def init_logger(name: str) -> logging.Logger:
    """The logger of module `name` (pass `__name__`)."""
    _configure_root()
    return logging.getLogger(name)
