"""The byte tokenizer and the two toy models: pure functions, one method, any batch."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.toy import (
    EOS_TOKEN_ID,
    TOY_MODELS,
    VOCAB_SIZE,
    ByteTokenizer,
    Logits,
    ToyModel,
    ToyModelProtocol,
    ToyMoE,
)

TOKENIZER = ByteTokenizer()
rows = st.lists(st.tuples(st.integers(0, VOCAB_SIZE - 1), st.integers(0, 100_000)), min_size=1, max_size=12)


@pytest.fixture(params=sorted(TOY_MODELS))
def model(request: pytest.FixtureRequest) -> ToyModelProtocol:
    return TOY_MODELS[request.param](0)


# -- tokenizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "length"), [("hello", 5), ("hello world", 11), ("goodbye", 7), ("The capital of France is", 24), ("", 0)]
)
def test_one_byte_is_one_token(text: str, length: int) -> None:
    assert len(TOKENIZER.encode(text)) == length


@given(st.text())
def test_text_survives_a_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert all(0 <= i < 256 for i in ids)
    assert TOKENIZER.decode(ids) == text


@given(st.lists(st.integers(0, 256)))
def test_any_ids_decode_to_text_without_the_end_of_sequence(ids: list[int]) -> None:
    assert TOKENIZER.decode(ids) == TOKENIZER.decode([i for i in ids if i != EOS_TOKEN_ID])


def test_what_is_not_utf8_is_replaced() -> None:
    assert TOKENIZER.decode([104, 0xFF, 105, EOS_TOKEN_ID]) == "h�i"
    assert (TOKENIZER.vocab_size, TOKENIZER.eos_token_id) == (257, 256)


# -- models --------------------------------------------------------------------------------------------------


def test_logits_have_a_row_for_each_request(model: ToyModelProtocol) -> None:
    logits = model.forward([1, 2, 3], [0, 5, 9])
    assert logits.shape == (3, 257) and logits.dtype == np.float64
    assert np.isfinite(logits).all()


def assert_rows_ignore_the_batch(
    together: ToyModelProtocol, alone: ToyModelProtocol, batch: list[tuple[int, int]]
) -> None:
    logits = together.forward([token for token, _ in batch], [position for _, position in batch])
    for row, (token, position) in zip(logits, batch, strict=True):
        assert np.array_equal(row, alone.forward([token], [position])[0])


@pytest.mark.parametrize("name", sorted(TOY_MODELS))
@given(batch=rows)
def test_a_row_is_the_same_number_alone_or_in_any_batch(name: str, batch: list[tuple[int, int]]) -> None:
    """Bit for bit: another instance, another height, another neighbour."""
    assert_rows_ignore_the_batch(TOY_MODELS[name](7), TOY_MODELS[name](7), batch)


def test_a_row_that_feels_its_neighbours_is_noticed() -> None:
    """Broken control of the test above."""

    class Sociable(ToyModel):
        def forward(self, last_tokens: Sequence[int], positions: Sequence[int]) -> Logits:
            return super().forward(last_tokens, positions) + 1e-12 * len(last_tokens)

    with pytest.raises(AssertionError):
        assert_rows_ignore_the_batch(Sociable(7), Sociable(7), [(1, 1), (2, 2)])


def test_the_arithmetic_of_the_mixture_is_exact() -> None:
    """Every logit is a multiple of 2**-22 far below 2**31, so no order of summation can round."""
    tokens, positions = np.meshgrid(np.arange(VOCAB_SIZE), np.arange(ToyMoE.NUM_POSITIONS))
    logits = ToyMoE(3).forward(tokens.ravel().tolist(), positions.ravel().tolist())
    scaled = logits * 2.0**22
    assert np.array_equal(scaled, np.round(scaled)) and np.abs(logits).max() < 1000


def test_logits_depend_on_seed_token_and_position(model: ToyModelProtocol) -> None:
    base = model.forward([5], [5])
    assert not np.array_equal(base, model.forward([6], [5]))
    assert not np.array_equal(base, model.forward([5], [6]))
    assert not np.array_equal(base, type(model)(1).forward([5], [5]))  # type: ignore[call-arg]


def test_the_toys_are_different_models() -> None:
    logits = [TOY_MODELS[name](0).forward([5], [5]) for name in TOY_MODELS]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(logits, 2))


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, -(2**63), 2**70])
def test_any_integer_is_a_seed(seed: int) -> None:
    for build in TOY_MODELS.values():
        assert np.isfinite(build(seed).forward([1], [1])).all()


def test_greedy_text_can_be_read_and_sometimes_ends() -> None:
    """Letters and spaces, almost always; the end of the sequence about once in a hundred."""
    rng = np.random.default_rng(0)
    tokens, positions = rng.integers(0, 257, 20_000), rng.integers(0, 10_000, 20_000)
    chosen = ToyModel(0).forward(tokens.tolist(), positions.tolist()).argmax(axis=1)
    letters = np.isin(chosen, np.frombuffer(b"abcdefghijklmnopqrstuvwxyz ", dtype=np.uint8)).mean()
    assert letters > 0.98
    assert 0.004 < (chosen == EOS_TOKEN_ID).mean() < 0.02


# -- mixture of experts ----------------------------------------------------------------------------------------


def test_each_row_is_routed_to_its_two_best_experts() -> None:
    moe = ToyMoE(0)
    hidden = moe.token_embedding[:50]
    experts, gates = moe.route(hidden)
    scores = hidden @ moe.router
    assert experts.shape == gates.shape == (50, 2)
    for row in range(50):
        assert set(scores[row, experts[row]]) == set(np.sort(scores[row])[-2:])
        assert gates[row, 0] >= gates[row, 1] >= 0
    assert np.abs(gates.sum(axis=1) - 1).max() <= 2 / 256


def test_all_experts_are_used() -> None:
    moe = ToyMoE(0)
    assert set(np.unique(moe.route(moe.token_embedding)[0])) == {0, 1, 2, 3}


def test_the_batched_mixture_equals_one_expert_at_a_time() -> None:
    moe = ToyMoE(2)
    hidden = moe.token_embedding[10:20] + moe.position_embedding[3]
    experts, gates = moe.route(hidden)
    for row, x in enumerate(hidden):
        y = sum(
            gate * (np.maximum(x @ moe.w_in[e], 0.0) @ moe.w_out[e])
            for e, gate in zip(experts[row], gates[row], strict=True)
        )
        assert np.array_equal(moe._experts(hidden)[row], y)
