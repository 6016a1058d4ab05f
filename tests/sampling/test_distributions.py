"""Draws against exact distributions, for every truncation, and what no combination of parameters may break."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.sampling import sampler, truncation
from mini_vllm.sampling.metadata import SamplingMetadata, seed_key
from mini_vllm.sampling.philox import uniform
from mini_vllm.sampling.sampler import Sampler
from mini_vllm.sampling_params import SamplingParams

CUTS = [
    {},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.15},
    {"top_k": 6, "top_p": 0.8},
    {"min_p": 0.05, "top_p": 0.8},
    {"min_p": 0.02, "top_k": 7},
    {"min_p": 0.02, "top_k": 7, "top_p": 0.85, "temperature": 1.6},
]
LIMIT = 45.0
"""Chi-square with at most 11 degrees of freedom exceeds this once in 100,000."""


def exact(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The definition, in float64 and by a full sort: temperature, min-p, top-k, top-p."""
    weights = np.exp((logits - logits.max()).astype(np.float64) / params.temperature)
    order = np.argsort(-logits, kind="stable")
    kept = order[weights[order] >= params.min_p]
    if params.top_k > 0:
        kept = kept[: params.top_k]
    sums = np.cumsum(weights[kept]) / weights[kept].sum()
    kept = kept[: int((sums < params.top_p).sum()) + 1]
    result = np.zeros(len(logits))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


def sample(logits: np.ndarray, params: SamplingParams, draws: np.ndarray) -> np.ndarray:
    count = len(draws)
    metadata = SamplingMetadata.from_params([params] * count, [params.seed or 0] * count, draws.tolist())
    return Sampler()(torch.from_numpy(np.tile(logits, (count, 1)).astype(np.float32)), metadata).numpy()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    possible = probabilities > 0
    assert not counts[~possible].any(), "a token was drawn that cannot be"
    expected = probabilities[possible] * counts.sum()
    return float(((counts[possible] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("knobs", CUTS)
@pytest.mark.parametrize("wide", [False, True])
def test_draws_follow_the_exact_distribution(
    knobs: dict[str, float], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        for name, value in (("CANDIDATES", 2), ("_SPARE", 0), ("_MOST_CANDIDATES", 2)):
            monkeypatch.setattr(f"mini_vllm.sampling.truncation.{name}", value)
    logits = np.random.default_rng(8).standard_normal(12).astype(np.float32)
    params = SamplingParams(seed=4, **knobs)  # type: ignore[arg-type]
    counts = np.bincount(sample(logits, params, np.arange(20_000)), minlength=12)
    assert chi_square(counts, exact(logits, params)) < LIMIT


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"top_k": 5}, {"top_k": 6}),
        ({"top_p": 0.7}, {"top_p": 0.85}),
        ({"min_p": 0.15}, {"min_p": 0.3}),
        ({"temperature": 1.0}, {"temperature": 1.1}),
    ],
)
def test_the_chi_square_notices_a_knob_turned_a_little(right: dict[str, float], wrong: dict[str, float]) -> None:
    """Broken control of the test above."""
    logits = np.random.default_rng(8).standard_normal(12).astype(np.float32)
    asked = SamplingParams(seed=4, **(right | wrong))  # type: ignore[arg-type]
    counts = np.bincount(sample(logits, asked, np.arange(20_000)), minlength=12)
    with pytest.raises(AssertionError):
        assert chi_square(counts, exact(logits, SamplingParams(**right))) < LIMIT  # type: ignore[arg-type]


def test_min_p_comes_before_top_p() -> None:
    """p = (.5, .3, .15, .05), top_p = .6, min_p = .4: min-p leaves (.5, .3), of which the first is .625 already. The
    other order would keep both."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    assert set(sample(logits, SamplingParams(top_p=0.6, min_p=0.4, seed=1), np.arange(500))) == {0}
    assert set(sample(logits, SamplingParams(top_p=0.6, seed=1), np.arange(500))) == {0, 1}
    assert set(sample(logits, SamplingParams(min_p=0.4, seed=1), np.arange(500))) == {0, 1}


@settings(max_examples=60)
@given(st.data())
def test_what_is_drawn_is_in_the_support_and_never_masked(data: st.DataObject) -> None:
    vocab = data.draw(st.sampled_from([3, 20, 200]))
    logits = data.draw(st.lists(st.floats(-20, 20, width=16), min_size=vocab, max_size=vocab))
    row = np.array(logits, dtype=np.float32)
    masked = data.draw(st.sets(st.integers(0, vocab - 1), max_size=vocab - 1))
    row[list(masked)] = -np.inf
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.2, 1.0, 5.0])),
        top_k=data.draw(st.sampled_from([0, 1, 3, 50])),
        top_p=data.draw(st.sampled_from([1.0, 0.9, 0.3])),
        min_p=data.draw(st.sampled_from([0.0, 0.05, 0.9])),
        seed=data.draw(st.integers(0, 1000)),
    )
    drawn = set(sample(row, params, np.arange(40)).tolist())
    assert not drawn & masked
    probabilities = exact(row, params)
    assert probabilities.sum() == pytest.approx(1.0)
    near = exact(row, SamplingParams(**_looser(params)))  # at a boundary, float32 may keep a token more
    assert all(near[token] > 0 for token in drawn)


def _looser(params: SamplingParams) -> dict[str, float]:
    return {
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": min(1.0, params.top_p + 1e-5),
        "min_p": max(0.0, params.min_p - 1e-5),
    }


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([5, 130, 700]))
def test_neutral_parameters_are_the_identity(seed: int, vocab: int) -> None:
    """top_k = vocabulary, top_p = 1 and min_p = 0 draw the very tokens that no truncation draws; so does each alone
    at a value that cuts nothing."""
    row = np.random.default_rng(seed).standard_normal(vocab)
    plain = sample(row, SamplingParams(seed=seed), np.arange(20)).tolist()
    for knobs in ({"top_k": vocab}, {"top_k": -1, "top_p": 1.0, "min_p": 0.0}, {"min_p": 1e-30}):
        assert sample(row, SamplingParams(seed=seed, **knobs), np.arange(20)).tolist() == plain  # type: ignore[arg-type]


def test_ties_beyond_the_candidates_go_to_the_lowest_ids() -> None:
    """As logits that come of bfloat16 have them: 400 tokens share the logit at the cut."""
    row = np.full(5000, -1.0)
    row[1000:1400] = 2.0
    row[3000] = 3.0
    drawn = sample(row, SamplingParams(top_k=5, temperature=100.0, seed=0), np.arange(400))
    assert set(drawn.tolist()) == {1000, 1001, 1002, 1003, 3000}


# --- streams -----------------------------------------------------------------------------------------------


class SharedStream:
    """What a sampler must not do: one stream for the batch, consumed in the order of the rows."""

    def __init__(self) -> None:
        self.position = 0

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        start, self.position = self.position, self.position + len(numbers)
        return uniform(np.zeros(len(numbers), dtype=np.uint64), np.arange(start, self.position))


def tokens_of_row_0(neighbours: int, shared: bool) -> list[int]:
    row = np.random.default_rng(1).standard_normal(50)
    stream, out = SharedStream(), []
    for step in range(12):
        params = [SamplingParams(seed=number) for number in range(neighbours + 1)]
        metadata = SamplingMetadata.from_params(params, list(range(neighbours + 1)), [step] * (neighbours + 1))
        if shared:
            metadata = SamplingMetadata(**(vars(metadata) | {"uniforms": stream}))
        out.append(int(Sampler()(torch.from_numpy(np.tile(row, (neighbours + 1, 1))).float(), metadata)[0]))
    return out


def test_a_seeded_row_draws_the_same_whoever_shares_the_batch() -> None:
    assert tokens_of_row_0(0, shared=False) == tokens_of_row_0(1, shared=False) == tokens_of_row_0(5, shared=False)


def test_a_shared_stream_would_not() -> None:
    """Broken control of the test above."""
    assert tokens_of_row_0(0, shared=True) != tokens_of_row_0(1, shared=True)


def test_samples_of_one_prompt_have_streams_of_their_own() -> None:
    keys = [seed_key(seed, index) for seed in (-3, 0, 1, 2) for index in range(50)]
    assert len(set(keys)) == len(keys)
    assert seed_key(17, 0) == 17 and seed_key(-1, 0) == 2**64 - 1


def test_how_a_row_is_looked_at_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways to the same distribution round differently, so a neighbour with a large top-k must not change the way."""
    wide = []
    original = truncation.draw_by_sorting

    def counted(logits: torch.Tensor, *args: object) -> torch.Tensor:
        wide.append(len(logits))
        return original(logits, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(truncation, "draw_by_sorting", counted)
    monkeypatch.setattr(sampler, "has_native_draws", lambda logits: False)
    logits = torch.rand(2, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, :120] += 12.0
    asked = [SamplingParams(top_p=0.9, seed=1), SamplingParams(top_k=230, seed=2)]
    for number in (1, 2):
        Sampler()(logits[:number], SamplingMetadata.from_params(asked[:number], [1, 2][:number], [0] * number))
    assert wide == [1, 1]
