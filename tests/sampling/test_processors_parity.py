"""Each stage on random logits, beside the logits processors of transformers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mini_vllm.sampling import draws
from mini_vllm.sampling.metadata import SamplingMetadata
from mini_vllm.sampling.sampler import Sampler
from mini_vllm.sampling_params import SamplingParams
from tests.sampling.rig import Rig, Row

VOCAB = 24
EVEN = 4096
"""Draws at evenly spaced uniforms: every token of more than 1/4096 comes up, in proportion."""
seeds = st.integers(0, 2**32 - 1)


def random_row(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(vocab) * 2).astype(np.float32)


def shares(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The share of each token among draws at evenly spaced uniforms: within 1/4096 of its probability."""
    metadata = SamplingMetadata.from_params([params] * EVEN, [0] * EVEN, [0] * EVEN)
    even = (np.arange(EVEN) + 0.5) / EVEN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws.philox, "uniform", lambda seed, index: even)
        tokens = Sampler()(torch.from_numpy(np.tile(logits, (EVEN, 1))), SamplingMetadata(**vars(metadata)))
    return np.bincount(tokens.numpy(), minlength=len(logits)) / EVEN


def softmax(logits: torch.Tensor) -> np.ndarray:
    return torch.softmax(logits.double(), dim=-1).squeeze(0).numpy()


def check(logits: np.ndarray, params: SamplingParams, warped: torch.Tensor) -> None:
    assert np.abs(shares(logits, params) - softmax(warped)).max() < 2 / EVEN


@settings(max_examples=15)
@given(seeds, st.sampled_from([0.4, 1.0, 2.5]), st.sampled_from([1, 2, 7, VOCAB]))
def test_top_k(seed: int, temperature: float, k: int) -> None:
    logits = random_row(seed)
    check(
        logits,
        SamplingParams(temperature=temperature, top_k=k),
        TopKLogitsWarper(k)(None, torch.from_numpy(logits)[None] / temperature),
    )


@settings(max_examples=15)
@given(seeds, st.sampled_from([0.4, 1.0, 2.5]), st.sampled_from([0.05, 0.5, 0.9, 0.999]))
def test_top_p(seed: int, temperature: float, p: float) -> None:
    logits = random_row(seed)
    check(
        logits,
        SamplingParams(temperature=temperature, top_p=p),
        TopPLogitsWarper(p)(None, torch.from_numpy(logits)[None] / temperature),
    )


@settings(max_examples=15)
@given(seeds, st.sampled_from([0.4, 1.0, 2.5]), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_min_p(seed: int, temperature: float, p: float) -> None:
    logits = random_row(seed)
    check(
        logits,
        SamplingParams(temperature=temperature, min_p=p),
        MinPLogitsWarper(p)(None, torch.from_numpy(logits)[None] / temperature),
    )


@settings(max_examples=15)
@given(seeds)
def test_all_of_them_in_vllms_order(seed: int) -> None:
    logits = random_row(seed)
    warped = torch.from_numpy(logits)[None] / 1.5
    for warper in (MinPLogitsWarper(0.02), TopKLogitsWarper(9), TopPLogitsWarper(0.8)):
        warped = warper(None, warped)
    check(logits, SamplingParams(temperature=1.5, min_p=0.02, top_k=9, top_p=0.8), warped)


@settings(max_examples=30)
@given(seeds, st.sampled_from([0.5, 1.1, 3.0]), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20))
def test_repetition_penalty(seed: int, strength: float, tokens: list[int]) -> None:
    logits, half = random_row(seed), len(tokens) // 2
    rig = Rig()
    rig.add(Row(SamplingParams(repetition_penalty=strength), tokens[:half] or [tokens[0]], tokens[half:]))
    theirs = RepetitionPenaltyLogitsProcessor(strength)(torch.tensor([tokens]), torch.from_numpy(logits)[None].clone())
    np.testing.assert_allclose(rig.edited(logits[None])[0], theirs[0].numpy(), rtol=1e-6)


@settings(max_examples=60)
@given(
    seeds,
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=6),
)
def test_bad_words(seed: int, bad_words: list[list[int]], output: list[int]) -> None:
    """The prompt is of other tokens: transformers looks at it too, vLLM only at the output."""
    logits = random_row(seed)
    rig = Rig()
    rig.add(Row(SamplingParams(), [9, 9, 9], list(output), bad_words=bad_words))
    ids = torch.tensor([[9, 9, 9, *output]])
    theirs = NoBadWordsLogitsProcessor(bad_words)(ids, torch.from_numpy(logits)[None].clone())
    np.testing.assert_array_equal(rig.edited(logits[None])[0], theirs[0].numpy())


@pytest.mark.parametrize("length", [0, 2, 3, 4])
def test_min_tokens(length: int) -> None:
    logits, prompt = random_row(3), [1, 2]
    rig = Rig()
    rig.add(Row(SamplingParams(min_tokens=3), prompt, [7] * length, stop_ids=[4, 9]))
    theirs = MinLengthLogitsProcessor(len(prompt) + 3, [4, 9])(
        torch.tensor([prompt + [7] * length]), torch.from_numpy(logits)[None].clone()
    )
    np.testing.assert_array_equal(rig.edited(logits[None])[0], theirs[0].numpy())


def test_the_comparison_notices_another_order() -> None:
    """Broken control: top-p before min-p keeps two tokens of this row, min-p before top-p one."""
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    params = SamplingParams(top_p=0.6, min_p=0.4)
    warped = MinPLogitsWarper(0.4)(None, TopPLogitsWarper(0.6)(None, torch.from_numpy(logits)[None]))
    with pytest.raises(AssertionError):
        check(logits, params, warped)
    check(logits, params, TopPLogitsWarper(0.6)(None, MinPLogitsWarper(0.4)(None, torch.from_numpy(logits)[None])))
    assert np.flatnonzero(shares(logits, params)).tolist() == [0]
