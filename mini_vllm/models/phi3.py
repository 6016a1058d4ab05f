"""Phi-3, Phi-3.5 and Phi-4 (mini): Mistral's layers, whose fused projections are fused in the checkpoint already."""

from typing import ClassVar

from mini_vllm.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from mini_vllm.models.mistral import MistralDecoderLayer
from mini_vllm.models.utils import PackedModulesMapping


class Phi3ForCausalLM(LlamaForCausalLM):
    """See `LlamaForCausalLM`. `qkv_proj` and `gate_up_proj` are single tensors, so nothing is packed on loading."""

    packed_modules_mapping: ClassVar[PackedModulesMapping] = {}
    layer_class: ClassVar[type[LlamaDecoderLayer]] = MistralDecoderLayer
    unsupported_options: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias", "lm_head_bias")
