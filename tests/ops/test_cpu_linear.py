"""Quantised linear layers: native kernels against the same quantised numbers multiplied in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.ops.cpu import library, linear, linear_ref
from mini_vllm.ops.cpu.linear import LinearFormat, PackedBF16Linear, PackedLinear

pytestmark = pytest.mark.skipif(not linear.available(), reason="no native kernels on this machine")

FORMATS = [
    LinearFormat("int8", "token"),
    LinearFormat("int8", "none"),
    LinearFormat("int8", "group", 64),
    *(LinearFormat("int4", "token", group, symmetric) for group in (32, 64, 128) for symmetric in (True, False)),
    *(LinearFormat("int4", "group", group, symmetric) for group in (32, 128) for symmetric in (True, False)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of the largest result: half a step of the type, and what float32 sums lose."""

formats = st.sampled_from(FORMATS)
dtypes = st.sampled_from(DTYPES)
row_counts = st.one_of(st.integers(1, 64), st.integers(100, 512))


def random_case(seed: int, rows: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and weights whose rows and columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) * torch.rand(rows, 1, generator=generator) * 4
    weight = torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator)
    return x, weight


def expected(packed: PackedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = linear_ref.dequantize(linear_ref.unpack(packed), torch.float64)[:, : packed.input_size]
    product = linear_ref.round_activations(x, packed.format, torch.float64) @ weight.T
    return product if bias is None else product + bias.double()


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    assert error <= ROUNDING[found.dtype], float(error)


@settings(max_examples=60, deadline=None)
@given(formats, dtypes, st.integers(0, 999), row_counts, st.integers(1, 130), st.integers(1, 600), st.booleans())
def test_kernels_multiply_the_quantised_numbers(
    format: LinearFormat, dtype: torch.dtype, seed: int, rows: int, outputs: int, inputs: int, with_bias: bool
) -> None:
    x, weight = random_case(seed, rows, outputs, inputs)
    packed = PackedLinear.pack(weight.to(dtype), format)
    bias = weight[:, 0].to(dtype) if with_bias else None
    assert_close(packed(x.to(dtype), bias), expected(packed, x.to(dtype), bias))


@settings(max_examples=40, deadline=None)
@given(formats, dtypes, st.integers(0, 999), row_counts, st.integers(1, 600))
def test_a_row_does_not_depend_on_its_neighbours_bit_for_bit(
    format: LinearFormat, dtype: torch.dtype, seed: int, rows: int, inputs: int
) -> None:
    x, weight = random_case(seed, rows, 70, inputs)
    packed, x = PackedLinear.pack(weight, format), x.to(dtype)
    row = seed % rows
    alone = packed(x[row : row + 1])[0]
    with_outliers = x.clone() * 0
    with_outliers[:] = 6e4
    with_outliers[row] = x[row]
    assert torch.equal(packed(x)[row], alone)
    assert torch.equal(packed(with_outliers)[row], alone)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_memory_around_a_view_is_neither_read_nor_written(format: LinearFormat) -> None:
    x, weight = random_case(3, 17, 45, 99)
    packed = PackedLinear.pack(weight, format)
    surrounded = torch.full((17, 140), float("nan"))
    surrounded[:, 20:119] = x
    assert torch.equal(packed(surrounded[:, 20:119]), packed(x))
    padded_weight = torch.full((45, 120), float("nan"))
    padded_weight[:, :99] = weight
    assert torch.equal(PackedLinear.pack(padded_weight[:, :99], format).data, packed.data)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_nan_reaches_the_outputs_of_its_row_and_no_other(format: LinearFormat) -> None:
    x, weight = random_case(4, 30, 40, 100)
    packed = PackedLinear.pack(weight, format)
    clean = packed(x)
    x[11, 57] = float("nan")
    found = packed(x)
    assert bool(found[11].isnan().all())
    found[11] = clean[11]
    assert torch.equal(found, clean)


@settings(max_examples=25, deadline=None)
@given(formats, st.integers(0, 999), st.integers(1, 100), st.integers(1, 500))
def test_packing_chooses_the_integers_that_the_reference_chooses(
    format: LinearFormat, seed: int, outputs: int, inputs: int
) -> None:
    _, weight = random_case(seed, 1, outputs, inputs)
    found = linear_ref.unpack(PackedLinear.pack(weight, format))
    wanted = linear_ref.quantize_weight(weight, format)
    if format.weights == "int8":
        assert torch.equal(found[0][:, :inputs], wanted[0])
        assert torch.equal(found[1], wanted[1])
        return
    # Which of two equally good ranges wins may differ with the order of a sum; the error may not.
    errors = [(linear_ref.dequantize(q, torch.float64)[:, :inputs] - weight).square().sum() for q in (found, wanted)]
    assert abs(errors[0] - errors[1]) <= 1e-3 * errors[1] + 1e-12


def test_zero_weights_and_zero_activations_give_zero() -> None:
    for format in FORMATS:
        packed = PackedLinear.pack(torch.zeros(40, 70), format)
        assert not packed(torch.ones(3, 70)).any()
        assert not PackedLinear.pack(torch.ones(40, 70), format)(torch.zeros(20, 70)).any()


def test_no_rows_give_no_rows() -> None:
    assert PackedLinear.pack(torch.ones(40, 70), FORMATS[0])(torch.zeros(0, 70)).shape == (0, 40)


def test_the_comparison_notices_a_wrong_scale() -> None:
    x, weight = random_case(5, 9, 64, 128)
    packed = PackedLinear.pack(weight, FORMATS[0])
    wanted = expected(packed, x, None)
    packed.data[64 * 128 :].view(torch.float32)[7] *= 1.01
    with pytest.raises(AssertionError):
        assert_close(packed(x), wanted)


@pytest.mark.parametrize(("outputs", "inputs"), [(192, 256), (100, 70), (33, 898)])
def test_few_rows_read_the_weights_that_onednn_packed(outputs: int, inputs: int) -> None:
    _, weight = random_case(6, 1, outputs, inputs)
    weight = weight.to(torch.bfloat16)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")
    kernel = PackedBF16Linear.wrap(torch.ops.mkldnn._reorder_linear_weight(weight, 1), weight)
    if kernel is None:
        pytest.skip(f"no such kernel for {library.loaded_isa()}")
    for rows in range(1, kernel.MAX_ROWS + 1):
        x = random_case(rows, rows, 1, inputs)[0].to(torch.bfloat16)
        found = kernel(x, weight[:, 0].contiguous())
        assert_close(found, x.double() @ weight.double().T + weight[:, 0].double())
        assert torch.equal(kernel(x[-1:], weight[:, 0].contiguous())[0], found[-1])


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_levels_give_the_same(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random_case(8, 37, 100, 300)
    here = [PackedLinear.pack(weight, format)(x) for format in FORMATS]
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    linear._kernels.cache_clear()
    try:
        there = [PackedLinear.pack(weight, format)(x) for format in FORMATS]
    finally:
        monkeypatch.undo()
        linear._kernels.cache_clear()
    for found, wanted in zip(there, here, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
