"""What a language model is to its callers, whatever its family: a body that makes hidden states, a head, logits.

A family builds its body, calls `add_head`, and says how its tensors are called in a checkpoint.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.embedding import ParallelLMHead
from mini_vllm.layers.logits import LogitsProcessor
from mini_vllm.models.utils import IntermediateTensors, PackedModulesMapping, join_prefix, refuse_options
from mini_vllm.quantization.base import QuantizationConfig


class CausalLM(nn.Module):
    """Base of every family. unsupported_options: keys of config.json that are refused when they are set."""

    packed_modules_mapping: ClassVar[PackedModulesMapping] = {}
    unsupported_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, hf_config: HFConfig) -> None:
        super().__init__()
        refuse_options(hf_config.raw, hf_config.model_type, self.unsupported_options)
        self.config = hf_config

    def add_head(self, width: int, *, dtype: torch.dtype, quant_config: QuantizationConfig | None, prefix: str) -> None:
        """The head over hidden states of `width`, tied to the embedding where the config says so."""
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, width,
            dtype=dtype, quant_config=quant_config, prefix=join_prefix(prefix, "lm_head"),
        )  # fmt: skip
        if self.config.tie_word_embeddings:
            self.lm_head.tie_weights(self.embedding())
        self.logits_processor = LogitsProcessor()

    def body(self) -> Any:
        """The module below the head."""
        return self.model

    def embedding(self) -> Any:
        """The body's table of token embeddings."""
        return self.body().embed_tokens

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, embedding width], without positions."""
        embeds: torch.Tensor = self.embedding()(input_ids)
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Flat batch input_ids [N] (or inputs_embeds [N, embedding width]), positions [N] -> hidden [N, hidden]."""
        hidden: torch.Tensor = self.body()(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] -> float32 logits [R, vocab_size]."""
        logits: torch.Tensor = self.logits_processor(self.lm_head, hidden)
        return logits
