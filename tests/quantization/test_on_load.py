"""Quantisation while loading, end to end on the bundled model: what it changes, how little, and what is refused."""

import logging
from typing import Any

import pytest
import torch

from mini_vllm.config import QuantizationOptions
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.exceptions import ConfigError
from mini_vllm.models.loader import load_model
from mini_vllm.models.utils import weight_bytes
from mini_vllm.ops.cpu import linear
from mini_vllm.ops.cpu.linear_ref import ReferenceLinear
from mini_vllm.quantization.base import get_quant_config
from mini_vllm.quantization.packed import PackedLinearMethod

METHODS: list[dict[str, Any]] = [
    {"quantization": "int8"},
    {"quantization": "w8a16"},
    {"quantization": "int8", "quantization_activation_scales": "group"},
    {"quantization": "int4"},
    {"quantization": "int4", "quantization_symmetric": False, "quantization_lm_head": "same"},
]
PROMPTS = ["def read(self", "import os\n\nclass Path", "for i in range(", "    return self._"]


def model_of(dtype: str = "float32", **arguments: Any) -> torch.nn.Module:
    config = EngineArgs(dtype=dtype, **arguments).create_engine_config()
    return load_model(config.model, config.load, torch.device("cpu"))


def generated(**arguments: Any) -> list[Any]:
    from mini_vllm import LLM, SamplingParams

    llm = LLM(disable_log_stats=True, **arguments)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=16, logprobs=5), use_tqdm=False)
    return [output.outputs[0] for output in outputs]


@pytest.mark.parametrize("arguments", METHODS, ids=str)
def test_greedy_tokens_differ_from_plain_weights_only_at_near_ties(arguments: dict[str, Any]) -> None:
    """Until the first difference both saw the same text; there, plain weights found both tokens about as good."""
    allowed = 1.0 if arguments["quantization"] == "int4" else 0.15
    for plain, quantized in zip(generated(), generated(**arguments), strict=True):
        pairs = enumerate(zip(plain.token_ids, quantized.token_ids, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), None)
        if first is not None:
            there = plain.logprobs[first]
            assert quantized.token_ids[first] in there, "not even among the five best"
            gap = there[plain.token_ids[first]].logprob - there[quantized.token_ids[first]].logprob
            assert gap < allowed, (first, gap)


@pytest.mark.parametrize("arguments", METHODS, ids=str)
def test_a_request_gets_the_same_tokens_and_logprobs_alone_and_in_company(arguments: dict[str, Any]) -> None:
    from mini_vllm import LLM, SamplingParams

    llm = LLM(dtype="float32", enable_prefix_caching=False, disable_log_stats=True, **arguments)
    params = SamplingParams(temperature=0, max_tokens=8)
    together = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, one in zip(PROMPTS, together, strict=True):
        alone = llm.generate([prompt], params, use_tqdm=False)[0]
        assert alone.outputs[0].token_ids == one.outputs[0].token_ids


def test_weights_shrink_and_their_memory_is_counted() -> None:
    plain = weight_bytes(model_of("bfloat16"))
    sizes = {lm_head: weight_bytes(model_of("bfloat16", quantization="int8", quantization_lm_head=lm_head))
             for lm_head in ("none", "int8")}  # fmt: skip
    embedding = 2048 * 256 * 2
    assert sizes["none"] < plain
    # The tied table keeps its plain matrix, so that rows can be gathered from it.
    assert sizes["int8"] < 0.52 * (plain - 2 * embedding) + embedding + 2048 * 256 * 1.1


def test_the_log_names_the_kernel_of_each_kind_of_layer(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("mini_vllm")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="mini_vllm"):
            model_of(quantization="int4", quantization_skip_layers="model.layers.0,down_proj")
    finally:
        logger.removeHandler(caplog.handler)
    text = caplog.text
    assert "Quantization of qkv_proj (1): not quantised" in text
    assert "Quantization of qkv_proj (3): int4 (group 32, symmetric) x int8 per token, native kernel" in text
    assert "Quantization of down_proj (4): not quantised" in text
    assert "Quantization of lm_head (1): int8 per channel x int8 per token" in text


def test_without_a_library_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(9, 256, generator=torch.Generator().manual_seed(1))
    found = model_of(quantization="int4").lm_head
    monkeypatch.setattr(linear, "available", lambda: False)
    reference = model_of(quantization="int4").lm_head
    assert isinstance(reference.linear_kernel, ReferenceLinear)
    assert isinstance(found.quant_method, PackedLinearMethod)
    outputs = [layer.quant_method.apply(layer, hidden) for layer in (found, reference)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"quantization": "awq"}, "quantization: must be one of int8, int4, int8_per_channel_weight_only"),
        ({"quantization_group_size": 64}, "quantization_group_size: nothing is quantised"),
        ({"quantization_skip_layers": "x"}, "quantization_skip_layers: nothing is quantised"),
        ({"quantization": "int8", "quantization_group_size": 64}, "quantization_group_size: nothing has groups"),
        ({"quantization": "int4", "quantization_group_size": 48}, "quantization_group_size: must be one of"),
        ({"quantization": "int8", "quantization_symmetric": False}, "quantization_symmetric: False is for int4"),
        ({"quantization": "w8a16", "quantization_lm_head": "int4"}, "leaves activations as they are"),
        ({"quantization": "int4", "quantization_lm_head": "fp8"}, "quantization_lm_head: must be one of"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineArgs(**arguments)


def test_a_pattern_that_matches_no_layer_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"quantization_skip_layers: q_proj matches no layer; there are .*qkv_proj"):
        model_of(quantization="int8", quantization_skip_layers=("q_proj", "o_proj"))


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        device_type = "cuda"

    monkeypatch.setattr("mini_vllm.quantization.on_load.current_platform", Cuda())
    with pytest.raises(ConfigError, match="has kernels for CPUs only, and the device is 'cuda'"):
        get_quant_config({}, QuantizationOptions("int8"))
