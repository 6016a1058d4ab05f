"""The batched sampler: against a slow oracle, against the teaching sampler, and against its own promises."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.sampling import draws, inversion, toy_sampler, truncation
from mini_vllm.sampling import sampler as sampler_module
from mini_vllm.sampling.metadata import SamplingMetadata
from mini_vllm.sampling.sampler import NO_TOKEN, Sampler
from mini_vllm.sampling_params import SamplingParams
from tests.sampling.oracle import sample_row

AMBIGUOUS = 1e-5
"""Nearer to a boundary than this, float32 weights may decide otherwise than the oracle's float64."""


def sample(logits: np.ndarray, params: Sequence[SamplingParams], draws: Sequence[int] | None = None) -> list[int]:
    """Seeds come from the params; draw indices default to 0."""
    seeds = [p.seed or 0 for p in params]
    metadata = SamplingMetadata.from_params(params, seeds, draws if draws is not None else [0] * len(params))
    return Sampler()(torch.from_numpy(logits.astype(np.float32)), metadata).tolist()


@contextmanager
def small_limits() -> Iterator[None]:
    """Few candidates, small blocks and chunks, so that small vocabularies take every path."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(sampler_module, _BLOCK=8, _CHUNK_ELEMENTS=100, _FEW_LOGITS=0))
        stack.enter_context(mock.patch.multiple(truncation, BLOCK=8, CANDIDATES=3, _SPARE=1, _MOST_CANDIDATES=9))
        stack.enter_context(mock.patch.object(inversion, "BLOCK", 8))
        yield


def random_logits(seed: int, rows: int, vocab: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "ties":
        return rng.integers(-2, 3, (rows, vocab)).astype(np.float32)
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    if kind == "masked":
        allowed = rng.random((rows, vocab)) < 0.3
        allowed[:, vocab // 2] = True
        logits[~allowed] = -np.inf
    return logits


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, list[SamplingParams], list[int]]:
    rows, vocab = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 7, 40, 300]))
    kind = draw(st.sampled_from(["plain", "ties", "masked"]))
    logits = random_logits(draw(st.integers(0, 2**32)), rows, vocab, kind)
    params = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        top_k=st.sampled_from([-1, 0, 1, 2, 5, max(1, vocab - 1), vocab, vocab + 3]),
        top_p=st.sampled_from([1.0, 0.97, 0.5, 0.13, 1e-6]),
        min_p=st.sampled_from([0.0, 0.0, 1e-3, 0.1, 0.7, 1.0]),
        seed=st.integers(-(2**63), 2**63 - 1),
    )
    indices = st.integers(0, 2**40)
    return (
        logits,
        draw(st.lists(params, min_size=rows, max_size=rows)),
        draw(st.lists(indices, min_size=rows, max_size=rows)),
    )


def check_against_oracle(
    logits: np.ndarray, asked: Sequence[SamplingParams], params: Sequence[SamplingParams], draws: Sequence[int]
) -> None:
    """`asked` is what the sampler is told, `params` what the oracle believes (different only in broken controls)."""
    seeds = [p.seed or 0 for p in asked]
    got = Sampler()(torch.from_numpy(logits), SamplingMetadata.from_params(asked, seeds, draws)).tolist()
    for row, token_id in enumerate(got):
        expected = sample_row(logits[row], params[row], params[row].seed or 0, draws[row])
        if expected.margin > AMBIGUOUS:
            assert token_id == expected.token_id, (row, params[row], expected)


@given(batches())
def test_every_row_gets_the_oracles_token(batch: tuple[np.ndarray, list[SamplingParams], list[int]]) -> None:
    logits, params, draws = batch
    check_against_oracle(logits, params, params, draws)
    with small_limits():
        check_against_oracle(logits, params, params, draws)


@pytest.mark.parametrize("wrong", [{"top_k": 6}, {"top_p": 0.72}, {"temperature": 1.3}, {"seed": 12}])
def test_the_oracle_notices_a_sampler_that_is_slightly_off(wrong: dict[str, float]) -> None:
    """Broken control: one knob turned a little shows within some draws."""
    right = {"top_k": 5, "top_p": 0.7, "temperature": 1.0, "seed": 11}
    logits = random_logits(3, 400, 12, "plain")
    params = [SamplingParams(**right)] * 400  # type: ignore[arg-type]
    check_against_oracle(logits, params, params, range(400))
    with pytest.raises(AssertionError):
        check_against_oracle(logits, [SamplingParams(**(right | wrong))] * 400, params, range(400))  # type: ignore[arg-type]


@given(batches(), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_its_neighbours(batch, random) -> None:  # type: ignore[no-untyped-def]
    logits, params, draws = batch
    together = sample(logits, params, draws)
    order = random.sample(range(len(params)), len(params))
    shuffled = sample(logits[order], [params[i] for i in order], [draws[i] for i in order])
    assert shuffled == [together[i] for i in order]
    assert [sample(logits[i : i + 1], [params[i]], [draws[i]])[0] for i in range(len(params))] == together


# --- greedy ------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_of_the_highest_and_ignores_every_other_knob() -> None:
    logits = np.array([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0], [-np.inf, -9.0, -np.inf, -9.0]])
    hostile = SamplingParams(temperature=0.0, top_k=1, top_p=1e-9, seed=99)
    assert sample(logits, [hostile] * 3) == [1, 0, 1]


@given(st.integers(0, 2**32), st.sampled_from([1, 8, 9, 15, 16, 17, 24, 31, 300, 512, 513, 900]), st.booleans())
def test_the_two_level_argmax_is_the_argmax(seed: int, vocab: int, special: bool) -> None:
    logits = random_logits(seed, 20, vocab, "ties")
    rng = np.random.default_rng(seed)
    for row in logits if special else ():
        row[rng.integers(0, vocab, 2)] = rng.choice([np.nan, np.inf, -np.inf], 2)
    tensor = torch.from_numpy(logits)
    expected = tensor.argmax(dim=1)
    for block in (8, sampler_module._BLOCK):
        with mock.patch.multiple(sampler_module, _BLOCK=block, _FEW_LOGITS=0):
            found = sampler_module.find_best(tensor)
        assert torch.equal(found.best_ids, expected)
        torch.testing.assert_close(found.best, tensor.gather(1, expected[:, None]), equal_nan=True, rtol=0, atol=0)


def test_greedy_rows_equal_the_teaching_sampler() -> None:
    logits = random_logits(0, 64, 257, "ties")
    greedy = SamplingParams(temperature=0.0)
    assert sample(logits, [greedy] * 64) == [toy_sampler.sample(row.astype(np.float64), greedy) for row in logits]


def test_greedy_rows_draw_no_random_number() -> None:
    with mock.patch.object(draws.philox, "uniform", side_effect=AssertionError("drew")):
        sample(random_logits(1, 4, 10, "plain"), [SamplingParams(temperature=0.0)] * 4)
        with pytest.raises(AssertionError, match="drew"):
            sample(random_logits(1, 4, 10, "plain"), [SamplingParams(temperature=1.0)] * 4)


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    """Also between neighbouring floats, whose weights round to the same number at a high temperature."""
    logits = random_logits(2, 32, 50, "ties")
    logits[:, 31] = np.nextafter(np.float32(2.0), np.float32(3.0))
    params = [SamplingParams(temperature=100.0, top_k=1, seed=i) for i in range(32)]
    assert sample(logits, params) == sample(logits, [SamplingParams(temperature=0.0)] * 32) == [31] * 32


# --- what is kept ------------------------------------------------------------------------------------------


def support(row: list[float], **kwargs: float) -> set[int]:
    """Every token that many draws bring up."""
    count = 3000
    params = [SamplingParams(seed=5, **kwargs)] * count  # type: ignore[arg-type]
    return set(sample(np.tile(np.array(row), (count, 1)), params, range(count)))


def test_top_k_keeps_exactly_k_and_ties_go_to_the_lowest_ids() -> None:
    assert support([1.0, 2.0, 1.0, 2.0, 1.0, 1.0], top_k=4) == {0, 1, 2, 3}
    assert support([0.0] * 6, top_k=2) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_p_with_the_token_that_crosses() -> None:
    row = np.log([0.4, 0.4, 0.15, 0.05]).tolist()
    assert support(row, top_p=0.5) == {0, 1}
    assert support(row, top_p=0.81) == {0, 1, 2}
    assert support(row, top_p=1e-9) == {0}
    assert support([0.0] * 10, top_p=0.3) == {0, 1, 2}  # 3 of 10 reach 0.3 exactly: no fourth


def test_top_p_is_measured_on_what_top_k_left() -> None:
    row = np.log([0.3, 0.3, 0.2, 0.2]).tolist()
    assert support(row, top_k=2, top_p=0.55) == {0, 1}
    assert support(row, top_p=0.55) == {0, 1}
    assert support(row, top_k=2, top_p=0.5) == {0}  # half of what is left, but 0.3 of the whole


def test_a_wide_nucleus_is_found_beyond_the_first_candidates() -> None:
    """4,000 nearly equal tokens: 99 % of them are far more than the candidates looked at first."""
    rng = np.random.default_rng(0)
    row = (rng.standard_normal(4000) * 1e-3).astype(np.float32)
    params = SamplingParams(top_p=0.99, seed=3)
    for draw in range(20):
        expected = sample_row(row, params, 3, draw)
        assert sample(row[None], [params], [draw]) == [expected.token_id]
        assert len(expected.support) > truncation.CANDIDATES


def test_masked_tokens_are_never_drawn() -> None:
    logits = random_logits(4, 2000, 9, "plain")
    logits[:, [0, 3, 8]] = -np.inf
    params = [SamplingParams(temperature=50.0, seed=i) for i in range(2000)]
    assert set(sample(logits, params)) == {1, 2, 4, 5, 6, 7}


@pytest.mark.parametrize("extreme", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_uniform_range_give_the_first_and_the_last_possible_token(extreme: float) -> None:
    logits = random_logits(6, 5, 700, "plain")
    logits[:, :3] = logits[:, 690:] = -np.inf
    with mock.patch.object(draws.philox, "uniform", return_value=np.full(5, extreme)):
        got = sample(logits, [SamplingParams()] * 5)
    assert got == [3 if extreme == 0.0 else 689] * 5


# --- distributions -----------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    possible = expected > 0
    assert not counts[~possible].any()
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())


@pytest.mark.parametrize("by", ["draw_index", "seed"])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_draws_follow_the_softmax(by: str, temperature: float) -> None:
    count, row = 20_000, random_logits(8, 1, 10, "plain")[0] / 3
    params = [SamplingParams(temperature=temperature, seed=i if by == "seed" else 1) for i in range(count)]
    tokens = sample(np.tile(row, (count, 1)), params, range(count) if by == "draw_index" else [0] * count)
    expected = toy_sampler.softmax(row.astype(np.float64) / temperature) * count
    assert chi_square(np.bincount(tokens, minlength=10).astype(float), expected) < 40  # 9 degrees: 1 in 10^5


@pytest.mark.parametrize("knobs", [{}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.8, "temperature": 1.7}])
def test_draws_are_distributed_as_the_teaching_samplers(knobs: dict[str, float]) -> None:
    count, row = 4000, random_logits(9, 1, 12, "ties")[0]
    params = [SamplingParams(seed=seed, **knobs) for seed in range(count)]  # type: ignore[arg-type]
    toy = np.bincount([toy_sampler.sample(row.astype(np.float64), p) for p in params], minlength=12)
    ours = np.bincount(sample(np.tile(row, (count, 1)), params), minlength=12)
    assert set(np.flatnonzero(ours)) == set(np.flatnonzero(toy))
    both = (toy + ours)[toy + ours > 0]
    assert (((toy - ours)[toy + ours > 0]) ** 2 / both).sum() < 42  # at most 11 degrees: 1 in 10^5


def test_a_distribution_test_would_notice_a_wrong_temperature() -> None:
    """Broken control of the tests above."""
    count, row = 20_000, random_logits(8, 1, 10, "plain")[0] / 3
    tokens = sample(np.tile(row, (count, 1)), [SamplingParams(temperature=1.05, seed=1)] * count, range(count))
    expected = toy_sampler.softmax(row.astype(np.float64)) * count
    assert chi_square(np.bincount(tokens, minlength=10).astype(float), expected) > 40


# --- rows that cannot be sampled ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("knobs", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_rows_without_an_allowed_token_are_marked_and_harm_nobody(temperature: float, knobs: dict[str, float]) -> None:
    logits = random_logits(10, 5, 20, "plain")
    params = [SamplingParams(temperature=temperature, seed=i, **knobs) for i in range(5)]  # type: ignore[arg-type]
    healthy = sample(logits, params)
    logits[0] = -np.inf
    logits[2, 7] = np.nan
    logits[4, 3] = np.inf
    assert sample(logits, params) == [NO_TOKEN, healthy[1], NO_TOKEN, healthy[3], NO_TOKEN]


def test_logits_are_left_as_they_are() -> None:
    logits = torch.from_numpy(random_logits(11, 4, 30, "plain"))
    before = logits.clone()
    params = [SamplingParams(top_k=5, top_p=0.5, seed=1), SamplingParams(), SamplingParams(temperature=0.0)] * 2
    Sampler()(logits, SamplingMetadata.from_params(params[:4], range(4), range(4)))
    assert torch.equal(logits, before)
