"""A GGUF file's metadata as the config.json it was made from.

`gguf_hf_config` is handed an opened file and returns the `HFConfig` that the engine builds models from; everything a
config.json would say is read from metadata, or from which tensors there are. What has no equivalent here is refused
(`UnsupportedModelError`), what nobody understands is told in a warning: nothing is silently dropped.
"""

import math
from collections import Counter
from typing import Any

from mini_vllm.exceptions import CheckpointError
from mini_vllm.gguf.families import family_of
from mini_vllm.gguf.metadata import Metadata
from mini_vllm.gguf.quants import BF16, F16, F32, F64
from mini_vllm.gguf.reader import GGUFFile
from mini_vllm.gguf.vocab import end_token_ids, token_id
from mini_vllm.hf_config import HFConfig
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

_HARMLESS_KEYS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
_REFUSED_KEYS = ("expert_count", "attention.max_alibi_bias", "attention.clamp_kqv", "attention.scale", "logit_scale")
"""They change the result where they are set and not 0, and no family here has them."""
_YARN_NEUTRAL = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.1}
"""Values that change nothing."""
_DTYPES = {F32: "float32", F64: "float32", F16: "float16", BF16: "bfloat16"}


def gguf_hf_config(file: GGUFFile) -> HFConfig:
    """The model's configuration. Raises `CheckpointError` naming file and key, `UnsupportedModelError`."""
    config = config_dict(file)
    try:
        return HFConfig.from_dict(config)
    except CheckpointError as error:
        raise type(error)(f"{file.path.name}: its metadata says: {error}") from error


def config_dict(file: GGUFFile) -> dict[str, Any]:
    """What config.json would hold."""
    family, metadata = family_of(file), Metadata(file)
    for key in _REFUSED_KEYS:
        if metadata.get(key):
            raise metadata.unsupported(key, f"= {metadata.get(key)} is not supported for {file.architecture}")
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": stored_dtype(file),
        **family.constants,
        **_sizes(metadata),
        **_rope(metadata),
        **_special_token_ids(metadata),
        **family.options(metadata),
    }
    for key in _HARMLESS_KEYS:
        metadata.get(key)
    if ignored := metadata.ignored():
        logger.warning("%s: metadata that has no meaning here: %s", file.path.name, ", ".join(ignored))
    return {key: value for key, value in config.items() if value is not None}


def _sizes(metadata: Metadata) -> dict[str, Any]:
    heads = metadata.integer("attention.head_count")
    hidden = metadata.integer("embedding_length")
    head_dim = metadata.integer("attention.key_length", hidden // heads)
    if metadata.integer("attention.value_length", head_dim) != head_dim:
        raise metadata.unsupported("attention.value_length", f"differs from the key length {head_dim}")
    return {
        "vocab_size": _vocab_size(metadata),
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer("context_length"),
        **_epsilon(metadata),
    }


def _vocab_size(metadata: Metadata) -> int:
    """Rows of the embedding: the token list may be shorter or padded."""
    embedding = metadata.file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{metadata.file.path.name}: tensor token_embd.weight is missing or no matrix")
    return embedding.shape[0]


def _epsilon(metadata: Metadata) -> dict[str, Any]:
    if metadata.get("attention.layer_norm_rms_epsilon") is not None:
        return {"rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon")}
    return {"layer_norm_eps": metadata.number("attention.layer_norm_epsilon")}


def _rope(metadata: Metadata) -> dict[str, Any]:
    """rope_theta, rope_scaling and the rotated share of a head."""
    head_dim = metadata.integer(
        "attention.key_length", metadata.integer("embedding_length") // metadata.integer("attention.head_count")
    )
    rotated = metadata.integer("rope.dimension_count", head_dim, minimum=2)
    return {
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata),
        "partial_rotary_factor": rotated / head_dim,
    }


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    if "rope_freqs.weight" in metadata.file.tensors:
        return _explicit_factors(metadata)
    if "rope_factors_long.weight" in metadata.file.tensors:
        return _longrope(metadata)
    kind = metadata.string("rope.scaling.type", "none")
    old_factor = metadata.get("rope.scale_linear")
    if kind == "none" and old_factor in (None, 1.0):
        return None
    factor = metadata.number("rope.scaling.factor", old_factor or 1.0)
    if kind in ("linear", "none"):
        return {"rope_type": "linear", "factor": factor} if factor != 1 else None
    if kind == "yarn":
        return _yarn(metadata, factor)
    raise metadata.unsupported("rope.scaling.type", f"{kind!r} is not supported for {metadata.architecture}")


def _yarn(metadata: Metadata, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length"),
    }
    for ours, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if metadata.get(f"rope.scaling.{key}") is not None:
            scaling[ours] = metadata.number(f"rope.scaling.{key}")
    for key in _YARN_NEUTRAL:
        value = metadata.get(f"rope.scaling.{key}")
        if value not in (None, _YARN_NEUTRAL[key]):
            raise metadata.unsupported(
                f"rope.scaling.{key}", f"= {value} is not supported: writers differ on its meaning"
            )
    return scaling


def _explicit_factors(metadata: Metadata) -> dict[str, Any]:
    """Llama 3.1's scaling: the file holds, per pair of dimensions, what its frequency is divided by.

    That is longrope's form with one list for every length.
    """
    factors = _factors(metadata, "rope_freqs")
    for key in ("type", "factor", "original_context_length"):  # repeats what the factors say
        metadata.get(f"rope.scaling.{key}")
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": metadata.integer("context_length"),
    }


def _longrope(metadata: Metadata) -> dict[str, Any]:
    """Phi-3's scaling: two lists, for texts within the original context and beyond."""
    original = metadata.integer("rope.scaling.original_context_length")
    metadata.get("rope.scaling.type")
    return {
        "rope_type": "longrope",
        "short_factor": _factors(metadata, "rope_factors_short"),
        "long_factor": _factors(metadata, "rope_factors_long"),
        "factor": metadata.number("rope.scaling.factor", metadata.integer("context_length") / original),
        "attention_factor": metadata.number("rope.scaling.attn_factor", 1.0),
        "original_max_position_embeddings": original,
    }


def _factors(metadata: Metadata, name: str) -> list[float]:
    tensor = metadata.file.tensors.get(f"{name}.weight")
    if tensor is None or len(tensor.shape) != 1:
        raise CheckpointError(f"{metadata.file.path.name}: tensor {name}.weight is missing or no vector")
    factors: list[float] = tensor.read_rows().reshape(-1).tolist()
    return factors


def _special_token_ids(metadata: Metadata) -> dict[str, Any]:
    return {"bos_token_id": token_id(metadata, "bos"), "eos_token_id": end_token_ids(metadata) or None}


def stored_dtype(file: GGUFFile) -> str | None:
    """The float type most of the numbers are stored in; None when most are quantised."""
    sizes: Counter[str | None] = Counter()
    for tensor in file.tensors.values():
        sizes[_DTYPES.get(tensor.kind)] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else None
