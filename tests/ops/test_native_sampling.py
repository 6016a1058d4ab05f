"""The native draws against the torch path and against the slow oracle: the same tokens, at every level there is."""

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_vllm.ops import sampling as native
from mini_vllm.ops.cpu import library
from mini_vllm.sampling import sampler as sampler_module
from mini_vllm.sampling.metadata import SamplingMetadata
from mini_vllm.sampling.sampler import NO_TOKEN, Sampler
from mini_vllm.sampling_params import SamplingParams
from tests.sampling.oracle import sample_row

pytestmark = pytest.mark.skipif(not library.available(), reason="no native kernels here")

AMBIGUOUS = 1e-5
"""Nearer to a boundary than this, float32 weights may decide otherwise than float64."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = library.library().mv_num_threads()
    library.set_num_threads(2)
    yield
    library.set_num_threads(before)


def make_logits(seed: int, rows: int, vocab: int, kind: str) -> torch.Tensor:
    """Rows that are followed by NaN in memory."""
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal((rows, vocab)) * 3
    if kind == "ties":
        numbers = rng.integers(-3, 3, (rows, vocab))
    elif kind == "equal":
        numbers = np.full((rows, vocab), -7.25)
    elif kind == "peaked":
        numbers = -1.6 * np.log(rng.permuted(np.tile(np.arange(1, vocab + 1), (rows, 1)), axis=1))
    elif kind == "masked":
        numbers[rng.random((rows, vocab)) < 0.7] = -np.inf
        numbers[:, vocab // 2] = 0
    wide = torch.full((rows, vocab + 5), float("nan"))
    wide[:, :vocab] = torch.from_numpy(numbers.astype(np.float32))
    return wide[:, :vocab]


def draw(logits: torch.Tensor, params: list[SamplingParams], with_kernel: bool = True) -> list[int]:
    seeds = [p.seed or 0 for p in params]
    metadata = SamplingMetadata.from_params(params, seeds, [0] * len(params))
    if with_kernel:
        return Sampler()(logits, metadata).tolist()
    with mock.patch.object(sampler_module, "has_native_draws", lambda logits: False):
        return Sampler()(logits, metadata).tolist()


LIMITS = st.builds(
    dict,
    temperature=st.sampled_from([1e-5, 0.3, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 50, 700, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.9999, 0.97, 0.5, 0.13, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 1e-6, 1e-3, 0.1, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@given(rows=st.integers(1, 5), vocab=st.sampled_from([1, 2, 7, 127, 128, 129, 1000, 33000, 70001]),
       kind=st.sampled_from(["plain", "ties", "equal", "peaked", "masked"]), limits=LIMITS,
       seed=st.integers(0, 2**32))  # fmt: skip
@settings(max_examples=60)
def test_every_draw_is_the_oracles(rows: int, vocab: int, kind: str, limits: dict[str, float], seed: int) -> None:
    logits = make_logits(seed, rows, vocab, kind)
    params = [SamplingParams(**limits | {"seed": limits["seed"] // (row + 1)}) for row in range(rows)]  # type: ignore[arg-type]
    found = draw(logits, params)
    for row, token in enumerate(found):
        expected = sample_row(logits[row].numpy(), params[row], params[row].seed or 0, 0)
        assert token == expected.token_id or expected.margin < AMBIGUOUS * max(1.0, 1 / params[row].temperature)


@given(vocab=st.sampled_from([40, 300, 20000]), kind=st.sampled_from(["plain", "peaked", "masked"]), limits=LIMITS,
       seed=st.integers(0, 2**32))  # fmt: skip
@settings(max_examples=40)
def test_the_tokens_are_those_of_the_torch_path(vocab: int, kind: str, limits: dict[str, float], seed: int) -> None:
    logits = make_logits(seed, 8, vocab, kind)
    params = [SamplingParams(**limits | {"seed": limits["seed"] // (row + 1)}) for row in range(8)]  # type: ignore[arg-type]
    found, wanted = draw(logits, params), draw(logits, params, with_kernel=False)
    for row in np.flatnonzero(np.array(found) != np.array(wanted)):
        expected = sample_row(logits[row].numpy(), params[row], params[row].seed or 0, 0)
        assert expected.margin < AMBIGUOUS * max(1.0, 1 / params[row].temperature)


def test_the_comparison_notices_a_cut_that_is_a_little_off() -> None:
    logits = make_logits(1, 64, 5000, "plain")
    right = [SamplingParams(temperature=1.0, top_p=0.9, seed=seed) for seed in range(64)]
    wrong = [SamplingParams(temperature=1.0, top_p=0.905, seed=seed) for seed in range(64)]
    assert draw(logits, wrong) != draw(logits, right, with_kernel=False)
    assert draw(logits, right) == draw(logits, right, with_kernel=False)


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.9}, {"top_k": 900}, {"min_p": 1e-4, "top_p": 0.7}])
def test_a_draw_depends_neither_on_the_threads_nor_on_the_neighbours(limits: dict[str, float]) -> None:
    logits = make_logits(3, 6, 70000, "plain")
    params = [SamplingParams(temperature=1.5, seed=seed, **limits) for seed in range(6)]  # type: ignore[arg-type]
    together = draw(logits, params)
    for threads in (1, 3):  # three threads and one row: the row's slices are shared out
        library.set_num_threads(threads)
        assert [draw(logits[row : row + 1], params[row : row + 1])[0] for row in range(6)] == together


def test_rows_without_an_allowed_token_are_marked() -> None:
    logits = make_logits(4, 4, 300, "plain").clone()
    logits[0], logits[1, 5], logits[2, 7] = -torch.inf, float("nan"), torch.inf
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=1)] * 4
    assert [token == NO_TOKEN for token in draw(logits, params)] == [True, True, True, False]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("limits", [(0, 1.0, 0.0), (0, 0.9, 0.0), (9, 1.0, 0.0), (9, 0.9, 0.1)])
def test_the_ends_of_the_uniform_range_give_possible_tokens(uniform: float, limits: tuple[int, float, float]) -> None:
    logits = make_logits(5, 1, 1000, "masked")
    top_k, top_p, min_p = limits
    columns = (torch.ones(1), torch.tensor([top_k or 1000]), torch.tensor([top_p]), torch.tensor([min_p]))
    best = logits.amax(dim=1, keepdim=True)
    token = native.draw_tokens(
        logits, torch.zeros(1, dtype=torch.int64), best, columns, torch.tensor([uniform]).double()
    )
    assert logits[0, int(token)] > -torch.inf


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["portable"])
def test_another_level_draws_the_same(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(6, 32, 20000, "peaked")
    params = [SamplingParams(temperature=0.8, top_p=0.9 + 0.002 * row, seed=row) for row in range(32)]
    here = draw(logits, params)
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    native._kernel.cache_clear()
    try:
        assert draw(logits, params) == here
    finally:
        monkeypatch.undo()
        native._kernel.cache_clear()
