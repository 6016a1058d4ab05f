"""The teaching sampler's own promises."""

import numpy as np
import pytest

from mini_vllm.sampling.toy_sampler import Sampler, apply_top_k, apply_top_p, sample, softmax
from mini_vllm.sampling_params import SamplingParams

ROW = np.array([1.0, 3.0, 2.0, 0.5, 3.0])


def kept(logits: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(logits)).tolist()


def test_softmax_is_a_distribution_and_is_stable() -> None:
    probabilities = softmax(np.array([1000.0, 1001.0, 999.0]))
    assert np.isfinite(probabilities).all()
    assert probabilities.sum() == pytest.approx(1.0)
    assert np.argsort(probabilities).tolist() == [2, 0, 1]


def test_greedy_is_argmax_and_ignores_every_other_knob() -> None:
    assert sample(ROW, SamplingParams(temperature=0.0, top_k=1, top_p=1e-6, seed=3)) == 1


def test_top_k_keeps_exactly_k_with_ties_to_the_lowest_id() -> None:
    assert kept(apply_top_k(ROW, 1)) == [1]
    assert kept(apply_top_k(ROW, 3)) == [1, 2, 4]
    assert kept(apply_top_k(np.zeros(5), 2)) == [0, 1]


@pytest.mark.parametrize("k", [-1, 0, 5, 9])
def test_top_k_that_keeps_all_changes_nothing(k: int) -> None:
    assert apply_top_k(ROW, k) is ROW


def test_top_p_keeps_the_smallest_sufficient_nucleus() -> None:
    row = np.log([0.4, 0.4, 0.15, 0.05])
    assert kept(apply_top_p(row, 0.5)) == [0, 1]
    assert kept(apply_top_p(row, 0.9)) == [0, 1, 2]
    assert kept(apply_top_p(row, 1e-9)) == [0]
    assert apply_top_p(row, 1.0) is row


def test_a_lower_temperature_sharpens() -> None:
    peaks = [softmax(ROW / temperature).max() for temperature in (0.2, 0.7, 1.0, 3.0)]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -5])
def test_seeded_sampling_is_reproducible(seed: int) -> None:
    params = SamplingParams(temperature=1.3, top_k=4, top_p=0.95, seed=seed)
    assert len({Sampler().sample(ROW, params) for _ in range(5)}) == 1


def test_unseeded_sampling_varies() -> None:
    assert len({sample(np.zeros(1000), SamplingParams()) for _ in range(10)}) > 1


def test_masked_tokens_are_never_drawn() -> None:
    row = np.array([-np.inf, 0.0, -np.inf, 0.0])
    assert {sample(row, SamplingParams(seed=seed)) for seed in range(50)} == {1, 3}
