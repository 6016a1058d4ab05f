"""Random numbers as a function of (seed, draw index): known answers, range, uniformity, independence."""

import numpy as np
import pytest

from mini_vllm.sampling.philox import philox4x32, uniform

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32-10
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def column(words: list[int]) -> np.ndarray:
    return np.array(words, dtype=np.uint32)[:, None]


def draws(seed: int, count: int) -> np.ndarray:
    return uniform(np.full(count, seed, dtype=np.uint64), np.arange(count))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox4x32(column(counter), column(key))[:, 0].tolist() == expected


def test_columns_do_not_influence_each_other() -> None:
    counters = np.hstack([column(counter) for counter, _, _ in KNOWN_ANSWERS])
    keys = np.hstack([column(key) for _, key, _ in KNOWN_ANSWERS])
    assert philox4x32(counters, keys).T.tolist() == [expected for _, _, expected in KNOWN_ANSWERS]


def test_uniform_is_made_of_53_bits_of_the_first_two_words() -> None:
    first, second = KNOWN_ANSWERS[0][2][:2]
    expected = ((first >> 5) * 2**26 + (second >> 6)) / 2**53
    assert uniform(np.zeros(1, np.uint64), np.zeros(1, np.int64))[0] == expected


def test_uniforms_lie_in_zero_to_one_and_are_evenly_spread() -> None:
    values = draws(7, 20_000)
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts = np.bincount((values * 100).astype(int), minlength=100)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 170  # 99 degrees of freedom: one chance in 10^5


def test_both_halves_of_seed_and_index_matter() -> None:
    def one(seed: int, index: int) -> float:
        return float(uniform(np.array([seed], dtype=np.uint64), np.array([index]))[0])

    assert len({one(3, 5), one(3 + 2**32, 5), one(3, 5 + 2**32), one(5, 3)}) == 4


def test_neighbouring_draws_and_seeds_are_uncorrelated() -> None:
    values = draws(1, 20_000)
    others = draws(2, 20_000)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(values, others)[0, 1]) < 0.03
