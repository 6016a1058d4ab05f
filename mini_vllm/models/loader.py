"""From a folder to a model ready to run: build it, fill it, and prepack each layer as soon as it is filled.

Nothing but safetensors and GGUF is opened: no pickle, no code from the folder. Tensors stay in their files until a
layer copies its part, and a layer's plain weight goes when its packed one is made, so no second copy of the model ever
exists. Every problem is a `CheckpointError` that names the file or tensor, and leaves nothing behind.
"""

import hashlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from mini_vllm.attention.selector import use_attn_backend
from mini_vllm.config import LoadConfig, ModelConfig
from mini_vllm.layers.linear import LoadedWeight
from mini_vllm.layers.norm import NORMS
from mini_vllm.logger import init_logger
from mini_vllm.models.finishing import LayerFinisher, release_weights
from mini_vllm.models.registry import ModelRegistry
from mini_vllm.models.safetensors_reader import LazyTensor, WeightFiles
from mini_vllm.ops.batch_invariance import batch_invariance
from mini_vllm.quantization.base import get_quant_config
from mini_vllm.weight_files import INDEX_FILE, WEIGHTS_FILE, find_weight_files

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "LazyTensor", "iterate_weights", "load_model"]

logger = init_logger(__name__)

DUMMY_STD = 0.02


def load_model(
    model_config: ModelConfig, load_config: LoadConfig, device: torch.device, *, attention_backend: str | None = None
) -> nn.Module:
    """The model on `device` in `model_config.dtype`, in eval mode, weights loaded and prepacked.

    Raises `UnsupportedModelError` for an architecture or option that is not implemented, `CheckpointError` for
    weights that are absent, damaged or do not fit; then the memory is free again, even while the error is kept.
    """
    hf_config = model_config.hf_config.with_max_model_len(model_config.max_model_len)
    model_class = ModelRegistry.resolve(hf_config.architectures)
    quant_config = get_quant_config(hf_config.raw, model_config.quantization)
    invariant = model_config.batch_invariant
    with batch_invariance(invariant), torch.device(device), use_attn_backend(attention_backend):
        model = model_class(hf_config, dtype=getattr(torch, model_config.dtype), quant_config=quant_config)
    if quant_config is not None:
        quant_config.check_complete()
    try:
        with batch_invariance(invariant), LayerFinisher(model) as finisher:
            start = time.perf_counter()
            source = fill_weights(model, model_config, load_config)
            finisher.finish_rest()
            seconds = time.perf_counter() - start
    except BaseException:
        release_weights(model)
        raise
    logger.info("%s: %.2f s, %.2f s of it prepacking", source, seconds, finisher.seconds)
    return model.eval()


def fill_weights(model: nn.Module, model_config: ModelConfig, load_config: LoadConfig) -> str:
    """Fill every parameter from where `load_config` says. Returns what was done, for the log."""
    path = Path(model_config.model)
    if load_config.load_format == "dummy":
        fill_with_random_weights(model, model_config.seed)
        return "Made random weights"
    if load_config.load_format == "gguf":
        from mini_vllm.models.gguf_loader import fill_from_gguf

        fill_from_gguf(model, path, getattr(torch, model_config.dtype), load_config.use_tqdm)
        return f"Read weights from {path.name}"
    with WeightFiles(find_weight_files(path)) as files:
        model.load_weights(files.tensors(load_config.use_tqdm))  # type: ignore[operator]
        return (
            f"Read {files.total_bytes / 2**20:.1f} MiB of weights from {files.num_files} "
            f"safetensors file{'s' if files.num_files > 1 else ''} ({files.wait_seconds:.2f} s waiting for the disk)"
        )


def iterate_weights(folder: Path, use_tqdm: bool = False) -> Iterator[tuple[str, LoadedWeight]]:
    """(name, lazy tensor) of every tensor in the checkpoint. A tensor is read in the turn it is yielded in."""
    with WeightFiles(find_weight_files(folder)) as files:
        yield from files.tensors(use_tqdm)


def fill_with_random_weights(model: nn.Module, seed: int) -> None:
    """Small random matrices and biases, norms at 1; each parameter's values depend on `seed` and its name only."""
    norms = {id(module.weight) for module in model.modules() if isinstance(module, NORMS)}
    bound = DUMMY_STD * math.sqrt(3)
    for name, param in model.named_parameters():
        if id(param) in norms:
            param.data.fill_(1)
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device=param.device).manual_seed(int.from_bytes(digest[:7], "little"))
        param.data.uniform_(-bound, bound, generator=generator)
