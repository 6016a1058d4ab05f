"""Linear layers over ranks: the parts of two (or four) ranks together must be the whole."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mini_vllm.distributed.parallel_state import get_tp_group, use_tp_group
from mini_vllm.exceptions import CheckpointError, ConfigError
from mini_vllm.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from mini_vllm.ops import linear as ops
from mini_vllm.ops.batch_invariance import batch_invariance
from mini_vllm.ops.cpu import library
from mini_vllm.ops.cpu import linear as kernels
from mini_vllm.platforms import CpuPlatform
from mini_vllm.quantization.base import QuantizationConfig, QuantizeMethodBase, get_quant_config
from mini_vllm.quantization.unquantized import UnquantizedLinearMethod

FLOAT32 = {"dtype": torch.float32}


@dataclass
class FakeGroup:
    """A rank whose collectives do nothing, so that a test can join the parts itself."""

    rank: int
    world_size: int

    def all_reduce(self, tensor):
        return tensor

    def all_gather(self, tensor, dim=-1):
        return tensor


class NarrowOnly:
    """A checkpoint tensor that counts what is read of it."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.read = tensor, tuple(tensor.shape), 0

    def narrow(self, dim, start, length):
        part = self.tensor.narrow(dim, start, length)
        self.read += part.numel()
        return part


def on_ranks(world_size, build):
    """[build() as each rank]."""
    layers = []
    for rank in range(world_size):
        with use_tp_group(FakeGroup(rank, world_size)):
            layers.append(build())
    return layers


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def load(layer, weight, bias=None, shard_id=None):
    layer.weight.weight_loader(layer.weight, weight, shard_id)
    if bias is not None:
        layer.bias.weight_loader(layer.bias, bias, shard_id)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_column_parallel_ranks_concatenate_to_the_whole(world_size):
    weight, bias, x = randn(12, 8), randn(12, seed=1), randn(5, 8, seed=2)
    layers = on_ranks(world_size, lambda: ColumnParallelLinear(8, 12, bias=True, **FLOAT32))
    for layer in layers:
        load(layer, weight, bias)
    parts = [layer(x) for layer in layers]
    assert parts[0].shape == (5, 12 // world_size)
    torch.testing.assert_close(torch.cat(parts, -1), F.linear(x, weight, bias))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_row_parallel_ranks_sum_to_the_whole_with_one_bias(world_size):
    weight, bias, x = randn(6, 16), randn(6, seed=1), randn(5, 16, seed=2)
    layers = on_ranks(world_size, lambda: RowParallelLinear(16, 6, bias=True, **FLOAT32))
    parts = []
    for layer, part in zip(layers, x.chunk(world_size, -1), strict=True):
        load(layer, weight, bias)
        parts.append(layer(part))
    torch.testing.assert_close(sum(parts), F.linear(x, weight, bias))


@pytest.mark.parametrize("world_size", [1, 2])
def test_merged_outputs_are_split_each_by_itself(world_size):
    gate, up, x = randn(8, 4), randn(6, 4, seed=1), randn(3, 4, seed=2)
    layers = on_ranks(world_size, lambda: MergedColumnParallelLinear(4, [8, 6], **FLOAT32))
    gates, ups = [], []
    for layer in layers:
        load(layer, gate, shard_id=0)
        load(layer, up, shard_id=1)
        parts = layer(x).split(layer.output_partition_sizes, -1)
        gates.append(parts[0])
        ups.append(parts[1])
    torch.testing.assert_close(torch.cat(gates, -1), F.linear(x, gate))
    torch.testing.assert_close(torch.cat(ups, -1), F.linear(x, up))


@pytest.mark.parametrize(("world_size", "kv_heads", "replicas"), [(1, 2, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_qkv_is_split_by_heads_and_kv_heads_are_replicated_when_ranks_outnumber_them(world_size, kv_heads, replicas):
    size, heads, hidden = 4, 4, 8
    weights = {name: randn(n * size, hidden, seed=n) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    biases = {name: weight[:, 0] for name, weight in weights.items()}
    x = randn(3, hidden, seed=9)
    whole = {name: F.linear(x, weights[name], biases[name]).view(3, -1, size) for name in weights}
    layers = on_ranks(world_size, lambda: QKVParallelLinear(hidden, size, heads, kv_heads, bias=True, **FLOAT32))
    for rank, layer in enumerate(layers):
        for name in weights:
            load(layer, weights[name], biases[name], name)
        assert layer.num_kv_head_replicas == replicas
        q, k, v = (part.view(3, -1, size) for part in layer(x).split([layer.q_size, layer.kv_size, layer.kv_size], -1))
        group = heads // kv_heads
        for local in range(layer.num_heads):
            head = rank * layer.num_heads + local
            # The KV head this rank would use for this query head is the one the whole model uses.
            local_kv = local // (layer.num_heads // layer.num_kv_heads)
            torch.testing.assert_close(q[:, local], whole["q"][:, head])
            torch.testing.assert_close(k[:, local_kv], whole["k"][:, head // group])
            torch.testing.assert_close(v[:, local_kv], whole["v"][:, head // group])


def test_a_rank_reads_only_its_part_of_a_tensor():
    with use_tp_group(FakeGroup(1, 2)):
        column, row = ColumnParallelLinear(8, 12, **FLOAT32), RowParallelLinear(8, 12, **FLOAT32)
    for layer in (column, row):
        tensor = NarrowOnly(randn(12, 8))
        load(layer, tensor)
        assert tensor.read == 12 * 8 // 2


def test_sizes_that_ranks_do_not_divide_are_refused():
    with use_tp_group(FakeGroup(0, 4)), pytest.raises(ConfigError, match=r"4 does not divide mlp.up output size 6"):
        ColumnParallelLinear(8, 6, prefix="mlp.up", **FLOAT32)
    with use_tp_group(FakeGroup(0, 4)), pytest.raises(ConfigError, match="4 does not divide num_attention_heads 6"):
        QKVParallelLinear(8, 4, 6, 2, **FLOAT32)


@pytest.mark.parametrize(
    ("layer", "shape", "expected", "shard_id"),
    [
        (ColumnParallelLinear(8, 12, **FLOAT32), (8, 12), r"\[12, 8\]", None),
        (RowParallelLinear(8, 12, **FLOAT32), (12, 16), r"\[12, 8\]", None),
        (MergedColumnParallelLinear(4, [8, 6], **FLOAT32), (8, 4), r"\[6, 4\]", 1),
        (QKVParallelLinear(8, 4, 4, 2, **FLOAT32), (16, 8), r"\[8, 8\]", "v"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(layer, shape, expected, shard_id):
    with pytest.raises(CheckpointError, match=f"expected {expected}"):
        load(layer, randn(*shape), shard_id=shard_id)


def test_one_rank_exchanges_nothing():
    group, x = get_tp_group(), randn(2, 3)
    assert (group.rank, group.world_size) == (0, 1)
    assert group.all_reduce(x) is x
    assert group.all_gather(x) is x


# --- the seam for weight formats ---------------------------------------------------------------------


class HalfScaleMethod(QuantizeMethodBase):
    """A format for tests: stores half the weight, and doubles the product."""

    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, params_dtype, **attrs):
        UnquantizedLinearMethod().create_weights(
            layer, input_size_per_partition, output_partition_sizes, params_dtype, **attrs
        )

    def process_weights_after_loading(self, layer):
        layer.weight = nn.Parameter(layer.weight / 2, requires_grad=False)

    def apply(self, layer, x, bias=None):
        return F.linear(x, layer.weight) * 2 + (0 if bias is None else bias)


class HalfScaleConfig(QuantizationConfig):
    def get_name(self):
        return "half"

    def get_quant_method(self, layer, prefix):
        return HalfScaleMethod() if prefix.endswith("quantized") else None


def test_a_weight_format_owns_its_layers_weights_and_leaves_others_alone():
    weight, x = randn(6, 4), randn(3, 4, seed=1)
    for prefix, method in (("a.quantized", HalfScaleMethod), ("a.plain", UnquantizedLinearMethod)):
        layer = ColumnParallelLinear(4, 6, quant_config=HalfScaleConfig(), prefix=prefix, **FLOAT32)
        assert type(layer.quant_method) is method
        load(layer, weight)
        layer.quant_method.process_weights_after_loading(layer)
        torch.testing.assert_close(layer(x), F.linear(x, weight))


def test_a_declared_format_that_is_not_implemented_is_refused():
    assert get_quant_config({}, None) is None
    with pytest.raises(CheckpointError, match=r"quantization_config.quant_method 'gptq' is not supported"):
        get_quant_config({"quantization_config": {"quant_method": "gptq"}}, None)


# --- prepacking --------------------------------------------------------------------------------------

needs_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no oneDNN bf16 here")


@needs_bf16
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_one_prepacked_bf16_weight_serves_every_batch_as_f_linear_does(batch, bias):
    layer = ColumnParallelLinear(48, 40, bias=bias, dtype=torch.bfloat16)
    weight, offset = randn(40, 48).bfloat16(), randn(40, seed=1).bfloat16()
    load(layer, weight, offset if bias else None)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.packed_weight is not None
    assert layer.weight is None  # the plain copy is gone
    x = randn(batch, 48, seed=2).bfloat16()
    expected = F.linear(x, weight, offset if bias else None)
    torch.testing.assert_close(layer(x), expected, atol=2e-2, rtol=2e-2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(layer(x * 1.1), expected, atol=2e-2, rtol=2e-2)


def test_a_large_float32_weight_is_packed_and_a_small_one_is_not(monkeypatch):
    assert ops.prepack(randn(16, 8)) is None
    monkeypatch.setattr(ops, "MIN_FLOAT32_ELEMENTS", 128)
    weight, x = randn(16, 8), randn(3, 8, seed=1)
    packed = ops.prepack(weight)
    assert packed is not None
    torch.testing.assert_close(ops.packed_linear(x, packed, None), F.linear(x, weight))


def test_nothing_is_packed_where_the_platform_does_not_gain(monkeypatch):
    from mini_vllm import platforms

    monkeypatch.setattr(platforms, "current_platform", type("Platform", (), {"prepacks_linears": False}))
    assert ops.prepack(randn(16, 8).bfloat16()) is None


def test_half_precision_stays_plain():
    assert ops.prepack(randn(16, 8).half()) is None


@pytest.mark.parametrize(
    ("isa", "bf16_hardware", "native"),
    [
        ("avx512", False, {"float32", "bfloat16", "float16"}),
        ("avx2", False, {"float32", "bfloat16", "float16"}),
        ("avx512_bf16", True, {"float32", "float16"}),
        ("portable", False, set()),
    ],
)
def test_the_native_kernel_multiplies_where_it_is_the_fastest(monkeypatch, isa, bf16_hardware, native):
    if not kernels.available():
        pytest.skip("no native kernels on this machine")
    monkeypatch.setattr(library, "loaded_isa", lambda: isa)
    monkeypatch.setattr(CpuPlatform, "supports_bf16", lambda self: bf16_hardware)
    for dtype in ("float32", "bfloat16", "float16"):
        packed = ops.native_linear(randn(16, 8).to(getattr(torch, dtype)))
        assert (packed is not None) == (dtype in native)
        with batch_invariance(True):
            assert ops.native_linear(randn(16, 8).to(getattr(torch, dtype))) is not None
