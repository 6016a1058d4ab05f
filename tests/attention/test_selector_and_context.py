"""Which backend a layer gets, and what it may look up while it runs."""

import logging

import pytest
import torch

from mini_vllm.attention.context import ForwardContext, get_forward_context, set_forward_context
from mini_vllm.attention.native import NativeBackend
from mini_vllm.attention.selector import _cached_backend, get_attn_backend, use_attn_backend
from mini_vllm.attention.torch_ref import TorchRefBackend
from mini_vllm.exceptions import ConfigError
from mini_vllm.layers.attention import Attention, get_attention_layers
from mini_vllm.ops.cpu import library


def log_lines(monkeypatch) -> list[str]:
    lines = []
    _cached_backend.cache_clear()
    monkeypatch.setattr(
        logging.getLogger("mini_vllm.attention.selector"), "info", lambda *a: lines.append(a[0] % a[1:])
    )
    return lines


def test_the_platform_chooses_when_nobody_else_does_and_it_is_logged_once(monkeypatch):
    lines = log_lines(monkeypatch)
    fastest = get_attn_backend(None, 64, torch.float32)
    assert fastest is (NativeBackend if library.available() else TorchRefBackend)
    assert get_attn_backend(fastest.name.lower(), 64, torch.float32) is fastest
    assert lines == [f"Using {fastest.name} attention backend"]


def test_without_a_kernel_library_the_reference_serves_and_the_native_backend_says_why(monkeypatch):
    lines = log_lines(monkeypatch)
    monkeypatch.setattr(library, "available", lambda: False)
    assert get_attn_backend(None, 64, torch.float32) is TorchRefBackend
    assert lines == ["Using TORCH_REF attention backend"]
    with pytest.raises(ConfigError, match="CPU_NATIVE cannot serve head size 64 in torch.float32: there is no library"):
        get_attn_backend("CPU_NATIVE", 64, torch.float32)
    _cached_backend.cache_clear()


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"attention_backend: 'FLASH' is unknown; available are .*TORCH_REF"):
        get_attn_backend("flash", 64, torch.float32)
    with use_attn_backend("flash"), pytest.raises(ConfigError, match="FLASH"):
        Attention(4, 64, 1.0, 2, prefix="x")


def test_a_backend_that_cannot_serve_a_layer_says_why():
    with pytest.raises(ConfigError, match=r"TORCH_REF cannot serve head size 64 in torch.int8: only floating-point"):
        get_attn_backend("TORCH_REF", 64, torch.int8)


def test_the_context_ends_with_its_block():
    with pytest.raises(RuntimeError, match="set_forward_context"):
        get_forward_context()
    outer, inner = ForwardContext({}, {}), ForwardContext({}, {})
    with set_forward_context(outer):
        with set_forward_context(inner):
            assert get_forward_context() is inner
        assert get_forward_context() is outer
    with pytest.raises(RuntimeError, match="set_forward_context"):
        get_forward_context()


def test_a_layer_knows_what_one_block_takes():
    layer = Attention(8, 32, 1.0, 4, prefix="model.layers.0.self_attn.attn")
    spec = layer.get_kv_cache_spec(16, "bfloat16")
    cache = torch.empty(layer.backend.kv_cache_shape(10, 16, 4, 32), dtype=torch.bfloat16)
    assert (spec.block_size, spec.dtype) == (16, "bfloat16")
    assert spec.page_size_bytes * 10 == cache.numel() * cache.element_size()
    assert get_attention_layers(torch.nn.Sequential(layer)) == {"model.layers.0.self_attn.attn": layer}
