"""Native kernels over rows against torch, over shapes, strides and types; poisoned tails."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.ops.activation import act, act_and_mul, act_and_mul_reference, act_reference
from mini_vllm.ops.argmax import argmax, argmax_reference, finite_argmax
from mini_vllm.ops.cpu import library
from mini_vllm.ops.lookup import as_logits, as_logits_reference, lookup, lookup_reference
from mini_vllm.ops.norm import (
    layer_norm,
    layer_norm_reference,
    rms_norm,
    rms_norm_heads,
    rms_norm_heads_reference,
    rms_norm_reference,
)
from mini_vllm.ops.rotary import apply_rotary, apply_rotary_reference, rotary_angles, rotary_angles_reference

pytestmark = pytest.mark.skipif(not library.available(), reason="no native kernels here")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Relative to the largest number: torch rounds to the narrow types between steps, the kernels do not."""
DTYPES = st.sampled_from(list(TOLERANCE))


def noise(*shape: int, dtype: torch.dtype, seed: int, padding: int = 0) -> torch.Tensor:
    """Random numbers whose last dimension is followed by `padding` NaNs in memory."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.full((*shape[:-1], shape[-1] + padding), float("nan"), dtype=dtype)
    wide[..., : shape[-1]] = torch.randn(*shape, generator=rng).to(dtype)
    return wide[..., : shape[-1]]


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype is expected.dtype and actual.shape == expected.shape
    scale = float(expected.abs().max()) + 1e-6 if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[actual.dtype], atol=TOLERANCE[actual.dtype] * scale)


@given(rows=st.integers(0, 40), width=st.integers(1, 700), dtype=DTYPES, wide_weight=st.booleans(),
       with_residual=st.booleans(), padding=st.sampled_from([0, 3]), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60)
def test_rms_norm(rows, width, dtype, wide_weight, with_residual, padding, seed):
    x = noise(rows, width, dtype=dtype, seed=seed, padding=padding)
    residual = noise(rows, width, dtype=dtype, seed=seed + 1, padding=padding) if with_residual else None
    weight = noise(width, dtype=torch.float32 if wide_weight else dtype, seed=seed + 2)
    (actual, total), (expected, sum_expected) = (f(x, residual, weight, 1e-6) for f in (rms_norm, rms_norm_reference))
    assert_near(actual, expected)
    assert torch.equal(total, sum_expected)


def test_rms_norm_of_heads_and_of_a_strided_view():
    heads = noise(5, 6, 24, dtype=torch.float32, seed=0)[:, 1:4]
    weight = noise(24, dtype=torch.float32, seed=1)
    assert_near(rms_norm(heads, None, weight, 1e-5)[0], rms_norm_reference(heads, None, weight, 1e-5)[0])


@given(tokens=st.integers(0, 20), first=st.integers(1, 4), others=st.integers(1, 3), width=st.integers(1, 70),
       dtype=DTYPES, wide_weight=st.booleans(), padding=st.sampled_from([0, 5]), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60)
def test_rms_norm_of_heads_with_two_weights(tokens, first, others, width, dtype, wide_weight, padding, seed):
    heads = noise(tokens, (first + others) * width, dtype=dtype, seed=seed, padding=padding)
    heads = heads.unflatten(1, (first + others, width))
    one, other = (noise(width, dtype=torch.float32 if wide_weight else dtype, seed=seed + i) for i in (1, 2))
    actual, expected = (f(heads, one, other, first, 1e-6) for f in (rms_norm_heads, rms_norm_heads_reference))
    assert_near(actual, expected)


@given(rows=st.integers(0, 40), width=st.integers(1, 700), dtype=DTYPES, with_bias=st.booleans(),
       with_residual=st.booleans(), padding=st.sampled_from([0, 3]), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60)
def test_layer_norm(rows, width, dtype, with_bias, with_residual, padding, seed):
    x = noise(rows, width, dtype=dtype, seed=seed, padding=padding) + 3
    residual = noise(rows, width, dtype=dtype, seed=seed + 1, padding=padding) if with_residual else None
    weight = noise(width, dtype=dtype, seed=seed + 2)
    bias = noise(width, dtype=dtype, seed=seed + 3) if with_bias else None
    (actual, total), (expected, sum_expected) = (
        f(x, residual, weight, bias, 1e-5) for f in (layer_norm, layer_norm_reference)
    )
    assert_near(actual, expected)
    assert torch.equal(total, sum_expected)


@given(
    positions=st.lists(st.integers(0, 131071), max_size=20), half=st.integers(1, 64), factor=st.sampled_from([1.0, 1.2])
)
@settings(max_examples=60)
def test_rotary_angles(positions, half, factor):
    inv_freq = 10000.0 ** (-torch.arange(half) / half)
    at = torch.tensor(positions, dtype=torch.int64)
    for actual, expected in zip(
        rotary_angles(at, inv_freq, factor), rotary_angles_reference(at, inv_freq, factor), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=3e-7)


@given(ids=st.lists(st.integers(0, 10), max_size=60), width=st.integers(1, 700), dtype=DTYPES, wide=st.booleans(),
       scale=st.sampled_from([1.0, 0.5, 24.0]), offset=st.sampled_from([0, 2]), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60)
def test_looked_up_rows(ids, width, dtype, wide, scale, offset, seed):
    table = noise(13, width, dtype=dtype, seed=seed)
    numbers = torch.tensor(ids, dtype=torch.int64 if wide else torch.int32)
    actual, expected = (f(numbers, table, scale=scale, offset=offset) for f in (lookup, lookup_reference))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("row", "offset"), [(-1, 0), (13, 0), (12, 1), (2**31 - 1, 2)])
def test_a_row_that_the_table_does_not_have_is_refused(row, offset):
    with pytest.raises(IndexError):
        lookup(torch.tensor([0, row]), torch.zeros(13, 4), offset=offset)


@given(rows=st.integers(0, 9), width=st.integers(1, 500), dtype=DTYPES, padding=st.sampled_from([0, 3]),
       cap=st.sampled_from([None, 30.0]), scale=st.sampled_from([1.0, 50.0]), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60)
def test_logits(rows, width, dtype, padding, cap, scale, seed):
    x = noise(rows, width, dtype=dtype, seed=seed, padding=padding) * scale
    actual, expected = as_logits(x, cap), as_logits_reference(x, cap)
    assert actual.dtype is torch.float32
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6 * scale)


@given(rows=st.integers(0, 40), width=st.integers(1, 500), dtype=DTYPES, padding=st.sampled_from([0, 3]),
       activation=st.sampled_from(["silu", "gelu_tanh", "gelu", "relu"]), scale=st.sampled_from([1.0, 20.0]),
       seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60)
def test_activations(rows, width, dtype, padding, activation, scale, seed):
    x = noise(rows, width, dtype=dtype, seed=seed, padding=padding) * scale
    assert_near(act(x, activation), act_reference(x, activation))


@given(tokens=st.integers(0, 30), heads=st.integers(1, 5), half=st.integers(1, 40), rest=st.sampled_from([0, 0, 6]),
       dtype=DTYPES, padding=st.sampled_from([0, 4]), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60)
def test_rotary(tokens, heads, half, rest, dtype, padding, seed):
    x = noise(tokens, heads, 2 * half + rest, dtype=dtype, seed=seed, padding=padding)
    cos, sin = (noise(tokens, 1, 2 * half, dtype=torch.float32, seed=seed + i) for i in (1, 2))
    assert_near(apply_rotary(x, (cos, sin)), apply_rotary_reference(x, (cos, sin)))


@given(rows=st.integers(0, 40), width=st.integers(1, 500), dtype=DTYPES, padding=st.sampled_from([0, 3]),
       activation=st.sampled_from(["silu", "gelu_tanh", "gelu"]), scale=st.sampled_from([1.0, 20.0]),
       seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=60)
def test_gated_activations(rows, width, dtype, padding, activation, scale, seed):
    x = noise(rows, 2 * width, dtype=dtype, seed=seed, padding=padding) * scale
    assert_near(act_and_mul(x, activation), act_and_mul_reference(x, activation))


def test_activations_at_the_ends_of_the_range():
    gate = torch.tensor([-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 1e30, float("nan")])
    x = torch.cat([gate, torch.ones(8)])[None]
    for activation in ("silu", "gelu_tanh"):
        actual, expected = act_and_mul(x, activation), act_and_mul_reference(x, activation)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


@given(rows=st.integers(1, 5), width=st.integers(1, 3000), values=st.sampled_from([2, 50, 10**6]),
       nan_at=st.one_of(st.none(), st.integers(0, 2999)), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=100)
def test_argmax_takes_the_first_of_the_highest_and_nan_before_all(rows, width, values, nan_at, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(-values, 0, (rows, width + 2), generator=rng).float()[:, :width]
    if nan_at is not None and nan_at < width:
        x[0, nan_at] = float("nan")
    (best, index), (best_expected, index_expected) = argmax(x), argmax_reference(x)
    assert torch.equal(index, index_expected)
    torch.testing.assert_close(best, best_expected, rtol=0, atol=0, equal_nan=True)


def test_without_a_finite_highest_there_is_no_token():
    x = torch.tensor([[1.0, 3.0, 2.0], [-torch.inf] * 3, [0.0, torch.inf, 1.0], [0.0, torch.nan, 1.0]])
    assert finite_argmax(x).tolist() == [1, -1, -1, -1]


def test_argmax_of_a_row_without_an_allowed_token_is_the_first():
    best, index = argmax(torch.full((1, 37), -torch.inf))
    assert (best.item(), index.item()) == (-torch.inf, 0)


# --- broken controls: the comparison fails when a kernel is wrong in one place --------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [1, 16, 37])
def test_control_one_wrong_number_at_the_end_of_a_row_is_noticed(width, dtype):
    x = noise(5, width, dtype=dtype, seed=1) + 2
    weight = torch.ones(width, dtype=dtype)
    actual, expected = (f(x, None, weight, 1e-6)[0] for f in (rms_norm, rms_norm_reference))
    assert_near(actual, expected)
    actual[4, -1] *= 1.1
    with pytest.raises(AssertionError):
        assert_near(actual, expected)


def test_control_a_row_read_past_its_end_is_noticed():
    """What `padding` is for: a kernel told that rows are one number longer meets the NaN behind them."""
    x = noise(3, 40, dtype=torch.float32, seed=0, padding=1)
    longer = x.as_strided((3, 41), x.stride())
    assert rms_norm(longer, None, torch.ones(41), 1e-6)[0].isnan().all()
    assert act(longer, "silu")[:, -1].isnan().all()
    assert argmax(longer)[1].tolist() == [40, 40, 40]
