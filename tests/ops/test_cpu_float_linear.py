"""Plain weights in native kernels: against float64, bit for bit across numbers of rows, within their memory."""

import ctypes
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.ops.cpu import build, library, linear
from mini_vllm.ops.cpu.linear import LinearFormat, PackedFloatLinear, PackedLinear

pytestmark = pytest.mark.skipif(not linear.available(), reason="no native kernels on this machine")

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of the largest result: half a step of the type, and what float32 sums lose."""
EDGES = (1, 2, 3, 5, 6, 7, 11, 12, 13, 18, 19, 31, 32, 33, 64, 96, 97, 511, 512, 513, 530)
"""Numbers of rows at which kernels change tiles, ways or blocks, and their neighbours."""

dtypes = st.sampled_from(list(ROUNDING))
row_counts = st.one_of(st.integers(1, 40), st.sampled_from(EDGES))


def random_case(seed: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(x, weight, bias) whose rows differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) * torch.rand(rows, 1, generator=generator) * 4
    weight = torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator)
    return x.to(dtype), weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    assert found.shape == wanted.shape and error <= ROUNDING[found.dtype], float(error)


@settings(max_examples=60, deadline=None)
@given(dtypes, st.integers(0, 999), row_counts, st.integers(1, 200), st.integers(1, 500), st.booleans())
def test_the_kernel_multiplies(
    dtype: torch.dtype, seed: int, rows: int, outputs: int, inputs: int, with_bias: bool
) -> None:
    x, weight, bias = random_case(seed, rows, outputs, inputs, dtype)
    wanted = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    assert_close(PackedFloatLinear.pack(weight)(x, bias if with_bias else None), wanted)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("inputs", [1, 95, 96, 97, 290])
def test_a_row_is_the_same_bits_in_every_number_of_rows(dtype: torch.dtype, inputs: int) -> None:
    x, weight, bias = random_case(1, max(EDGES), 130, inputs, dtype)
    packed = PackedFloatLinear.pack(weight)
    alone = torch.cat([packed(x[r : r + 1], bias) for r in range(max(EDGES))])
    for rows in EDGES:
        assert torch.equal(packed(x[:rows], bias), alone[:rows]), rows
        assert torch.equal(packed(x[-rows:], bias), alone[-rows:]), rows


def test_the_comparison_notices_a_sum_in_another_order() -> None:
    """Broken control: the inputs reversed give the same sums, but not the same bits."""
    x, weight, _ = random_case(2, 9, 64, 290, torch.float32)
    found, reversed_ = PackedFloatLinear.pack(weight)(x), PackedFloatLinear.pack(weight.flip(1))(x.flip(1))
    torch.testing.assert_close(found, reversed_, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, reversed_)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("rows", [1, 6, 7, 40])
def test_memory_around_is_neither_read_nor_written(dtype: torch.dtype, rows: int) -> None:
    x, weight, _ = random_case(3, rows, 45, 99, dtype)
    padded_weight = torch.full((45, 120), torch.nan, dtype=dtype)
    padded_weight[:, :99] = weight
    packed = PackedFloatLinear.pack(padded_weight[:, :99])
    assert torch.equal(packed.data, PackedFloatLinear.pack(weight).data)
    surrounded = torch.full((rows + 2, 140), torch.nan, dtype=dtype)
    surrounded[1:-1, 20:119] = x
    output = torch.full((rows + 2, 60), 7.0, dtype=dtype)
    inner, code = surrounded[1:-1, 20:119], library.DTYPE_CODES[dtype]
    linear._LINEAR(
        rows, ctypes.addressof(packed._struct), inner.data_ptr(), output[1:-1, 5:].data_ptr(), 140, 60, code, code
    )
    assert torch.equal(output[1:-1, 5:50], packed(x))
    output[1:-1, 5:50] = 7.0
    assert bool((output == 7.0).all())


@pytest.mark.parametrize("rows", [3, 30])
def test_a_nan_reaches_its_row_and_no_other(rows: int) -> None:
    x, weight, _ = random_case(4, rows, 40, 100, torch.float32)
    packed = PackedFloatLinear.pack(weight)
    clean = packed(x)
    x[1, 57] = torch.nan
    found = packed(x)
    assert bool(found[1].isnan().all())
    found[1] = clean[1]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("rows", [1, 5, 13, 40, 200])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_integers_do_not_overflow(rows: int, sign: float) -> None:
    """Every product as large as can be: what 16-bit sums of pairs must hold, and where saturating ones would lose."""
    inputs = 256
    x, weight = torch.full((rows, inputs), sign), torch.ones(64, inputs)
    for weights in (weight, -weight):
        for format in (LinearFormat("int8", "token"), LinearFormat("int8", "group"), LinearFormat("int4", "token")):
            torch.testing.assert_close(PackedLinear.pack(weights, format)(x), x @ weights.T, rtol=1e-3, atol=0)
    high = torch.ones(64, inputs)
    high[:, ::32] = 0.0  # a minimum of 0, so that all others are 15
    packed = PackedLinear.pack(high, LinearFormat("int4", "group", 32, symmetric=False))
    torch.testing.assert_close(packed(x), x @ high.T, rtol=2e-2, atol=0)


LEVELS_SCRIPT = """
import sys, torch
from mini_vllm.ops.cpu import library
from tests.ops import test_cpu_float_linear as floats, test_cpu_linear as packed
assert library.loaded_isa() == sys.argv[1]
floats.test_the_kernel_multiplies(), packed.test_kernels_multiply_the_quantised_numbers()
packed.test_a_row_does_not_depend_on_its_neighbours_bit_for_bit()
for dtype in floats.ROUNDING: floats.test_a_row_is_the_same_bits_in_every_number_of_rows(dtype, 97)
for rows in (1, 40): floats.test_the_largest_integers_do_not_overflow(rows, -1.0)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_level_of_this_machine_passes_these_tests(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not build.REQUIRED_CPU_FLAGS[isa] <= library.current_platform.cpu_flags():
        pytest.skip(f"this machine cannot run {isa}")
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    subprocess.run([sys.executable, "-c", LEVELS_SCRIPT, isa], check=True, timeout=900)
