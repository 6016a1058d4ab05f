"""The fixtures of the shells."""

from tests.shells import llama, make_engine, qwen2

__all__ = ["llama", "make_engine", "qwen2"]
