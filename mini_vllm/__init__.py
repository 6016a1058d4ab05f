"""mini_vllm: a small, complete LLM serving engine.

Importing this is cheap: torch, tokenizers and the rest load when a name that needs them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mini_vllm.engine.arg_utils import EngineArgs
    from mini_vllm.engine.llm_engine import LLMEngine
    from mini_vllm.entrypoints.llm import LLM
    from mini_vllm.outputs import BeamSearchOutput, CompletionOutput, RequestOutput
    from mini_vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
    from mini_vllm.toy import ToyEngine

__version__ = "0.1.0"

_HOMES = {
    "LLM": "mini_vllm.entrypoints.llm",
    "LLMEngine": "mini_vllm.engine.llm_engine",
    "EngineArgs": "mini_vllm.engine.arg_utils",
    "SamplingParams": "mini_vllm.sampling_params",
    "BeamSearchParams": "mini_vllm.sampling_params",
    "RequestOutputKind": "mini_vllm.sampling_params",
    "RequestOutput": "mini_vllm.outputs",
    "BeamSearchOutput": "mini_vllm.outputs",
    "CompletionOutput": "mini_vllm.outputs",
    "ToyEngine": "mini_vllm.toy",
}

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineArgs",
    "LLMEngine",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ToyEngine",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
