"""A checkpoint's config.json (and generation_config.json) as one typed, validated value.

Both spellings are read: `torch_dtype` or `dtype`, `rope_theta` with `rope_scaling` or `rope_parameters`. What is
missing or ill-typed is a `CheckpointError` naming file and key; a rotary scaling that is not implemented is an
`UnsupportedModelError`. Options only one family has stay in `raw`, and that family's model reads or refuses them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mini_vllm.exceptions import CheckpointError, UnsupportedModelError
from mini_vllm.hf_config.reader import CONFIG_FILE, NO_DEFAULT, SUPPORTED_DTYPES, ConfigReader, read_json
from mini_vllm.hf_config.rope import ORIGINAL, RopeConfig, RopeReader

__all__ = ["CONFIG_FILE", "GENERATION_CONFIG_FILE", "SUPPORTED_DTYPES", "HFConfig", "RopeConfig", "generation_config"]

GENERATION_CONFIG_FILE = "generation_config.json"
_LIMIT_IS_STRETCHED_ALREADY = ("gemma3", "gemma3_text")


@dataclass(frozen=True)
class HFConfig:
    """The parts of config.json that models are built from."""

    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    """As written in the file; a family may have a switch beside it."""
    dtype: str | None
    """What the weights are stored in, one of `SUPPORTED_DTYPES`; None when the file does not say."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any] = field(repr=False, hash=False)
    local_rope: RopeConfig | None = None
    """Of sliding-window layers, in families where it is not `rope`."""

    @classmethod
    def from_folder(cls, path: str | Path) -> "HFConfig":
        """Read `path`/config.json. Raises `CheckpointError`, `UnsupportedModelError`."""
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"model: {str(path)!r} is not a folder")
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"model: {str(path)!r} has no {CONFIG_FILE}")
        return cls.from_dict(read_json(folder / CONFIG_FILE))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "HFConfig":
        """The same from the parsed JSON."""
        read = ConfigReader(d)
        if isinstance(d.get("text_config"), dict) and read.d.get("num_attention_heads") is None:
            raise UnsupportedModelError(
                f"{CONFIG_FILE}: architectures {list(read.architectures())} is not supported: it has several parts, of "
                "which text_config is one; only models of text alone are supported"
            )
        num_heads = read.integer("num_attention_heads")
        return cls(
            architectures=read.architectures(),
            model_type=read.model_type,
            vocab_size=read.integer("vocab_size"),
            hidden_size=read.integer("hidden_size"),
            intermediate_size=read.intermediate_size(),
            num_hidden_layers=read.integer("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=read.kv_heads(num_heads),
            head_dim=read.head_dim(num_heads),
            hidden_act=read.string("hidden_act", "silu"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rope=RopeReader(read).rope(),
            max_position_embeddings=read.integer("max_position_embeddings"),
            tie_word_embeddings=read.boolean("tie_word_embeddings"),
            attention_bias=read.boolean("attention_bias"),
            mlp_bias=read.boolean("mlp_bias"),
            sliding_window=read.optional_integer("sliding_window", minimum=1),
            dtype=read.dtype(),
            bos_token_id=read.optional_integer("bos_token_id", minimum=0),
            eos_token_ids=read.eos_token_ids(),
            raw=dict(d),
            local_rope=RopeReader(read).local_rope(),
        )

    def optional_number(self, key: str) -> float | None:
        """An option only one family has: a positive number, None where it is null. Raises `CheckpointError`."""
        read = ConfigReader(self.raw)
        return None if read.d.get(key) is None else read.number(key)

    def number(self, key: str) -> float:
        """The same where the family cannot do without."""
        return ConfigReader(self.raw).number(key)

    def integer(self, key: str, default: int | None = None) -> int:
        return ConfigReader(self.raw).integer(key, NO_DEFAULT if default is None else default)

    def boolean(self, key: str) -> bool:
        return ConfigReader(self.raw).boolean(key)

    @property
    def derived_max_model_len(self) -> int:
        """Most tokens a request may ever hold: `max_position_embeddings`, or what rope scaling stretches it to."""
        scaling, limit = self.rope.scaling, self.max_position_embeddings
        if self.rope.rope_type == "yarn":
            return int(scaling[ORIGINAL] * scaling["factor"])
        stretched = self.rope.rope_type in ("linear", "dynamic") and self.model_type not in _LIMIT_IS_STRETCHED_ALREADY
        return int(limit * scaling["factor"]) if stretched else limit

    @property
    def default_max_model_len(self) -> int:
        """The limit when none is asked for. For longrope the original context: its long factors make short texts
        worse, so they have to be asked for."""
        limit = self.derived_max_model_len
        return min(limit, int(self.rope.scaling[ORIGINAL])) if self.rope.rope_type == "longrope" else limit

    def with_max_model_len(self, max_model_len: int | None) -> "HFConfig":
        """The config to build a model from for requests of at most this many tokens; None is the default limit.

        'auto', which may shrink to the pool when the model is long built, counts as None: what the pool holds never
        changes a token.
        """
        limit = self.default_max_model_len if max_model_len is None else max_model_len
        local_rope = None if self.local_rope is None else replace(self.local_rope, max_model_len=limit)
        return replace(self, rope=replace(self.rope, max_model_len=limit), local_rope=local_rope)


def generation_config(path: str | Path) -> dict[str, Any]:
    """The parsed `path`/generation_config.json; empty when there is none. Raises `CheckpointError` if malformed."""
    file = Path(path) / GENERATION_CONFIG_FILE
    return read_json(file) if file.is_file() else {}
