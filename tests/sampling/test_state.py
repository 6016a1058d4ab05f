"""The sampler's memory of rows: whatever came, went, moved and grew, it does what a recomputation from scratch does."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mini_vllm.sampling_params import SamplingParams
from tests.sampling.rig import MAX_ROWS, VOCAB, Rig, Row, expected_logits

ids = st.integers(0, VOCAB - 1)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    params = SamplingParams(
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5, -1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.7])),
        logit_bias=draw(st.none() | st.dictionaries(ids, st.floats(-5, 5), max_size=3)),
        allowed_token_ids=draw(st.none() | st.lists(ids, min_size=1, max_size=6)),
        min_tokens=draw(st.integers(0, 4)),
    )
    return Row(
        params,
        draw(st.lists(ids, min_size=1, max_size=8)),
        draw(st.just([]) | st.lists(ids, max_size=6)),
        stop_ids=draw(st.lists(ids, max_size=3)),
        bad_words=draw(st.just([]) | st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=3)),
    )


def random_logits(seed: int, count: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, VOCAB)) * 3).astype(np.float32)


class StateMachine(RuleBasedStateMachine):
    """Any order of arrivals, departures and growth. Tokens are from 0 to 3 mostly, so that they repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig()
        self.steps = 0

    @precondition(lambda self: len(self.rig.rows) < MAX_ROWS)
    @rule(row=rows())
    def add(self, row: Row) -> None:
        assert self.rig.add(row) is None

    @precondition(lambda self: self.rig.rows)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.rig.remove(data.draw(st.integers(0, len(self.rig.rows) - 1)))

    @precondition(lambda self: self.rig.rows)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        numbers = sorted(data.draw(st.sets(st.integers(0, len(self.rig.rows) - 1), min_size=1)))
        tokens = st.lists(st.integers(0, 3) | ids, min_size=len(numbers), max_size=len(numbers))
        for _ in range(data.draw(st.integers(1, 3))):
            self.rig.append(numbers, data.draw(tokens))

    @invariant()
    def a_step_does_what_the_definition_says(self) -> None:
        self.steps += 1
        everyone = list(range(len(self.rig.rows)))
        for numbers in (everyone, everyone[self.steps % 2 :: 2]):
            logits = random_logits(self.steps, len(numbers))
            expected = [expected_logits(row, self.rig.rows[n]) for row, n in zip(logits, numbers, strict=True)]
            if numbers:
                np.testing.assert_allclose(self.rig.edited(logits, numbers), expected, rtol=1e-5, atol=1e-5)


TestStateMachine = StateMachine.TestCase


def test_a_state_that_misses_one_token_shows() -> None:
    """Broken control of the machine above."""
    rig = Rig()
    rig.add(Row(SamplingParams(frequency_penalty=0.5), [1, 2]))
    rig.append([0], [7])
    logits = random_logits(0, 1)
    np.testing.assert_allclose(rig.edited(logits)[0], expected_logits(logits[0], rig.rows[0]), rtol=1e-5)
    rig.rows[0].output.append(7)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(rig.edited(logits)[0], expected_logits(logits[0], rig.rows[0]), rtol=1e-5)


def test_rows_that_ask_for_nothing_cost_nothing() -> None:
    rig = Rig()
    for _ in range(3):
        rig.add(Row(SamplingParams(temperature=0.7, top_p=0.9), [1, 2, 3]))
    rig.append([0, 1, 2], [4, 5, 6])
    from mini_vllm.sampling.history import StepRows

    step = StepRows(np.arange(3), 3)
    assert rig.state.edit(step) is None and rig.state.rescale(step) is None
    assert not rig.state.penalties._is_allocated


def test_the_memory_of_penalties_follows_the_tokens_seen_not_the_vocabulary() -> None:
    rig = Rig(vocab=1_000_000)
    rig.add(Row(SamplingParams(repetition_penalty=1.2), list(range(100)), [999_999]))
    assert rig.state.penalties.ids.nbytes < 10_000


def test_one_step_of_penalties_adds_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen before is not gone through again."""
    rig = Rig()
    rig.add(Row(SamplingParams(presence_penalty=0.5), [1, 2, 3], [4, 5]))

    def no_recount(*args: object, **kwargs: object) -> None:
        raise AssertionError("counted the whole history")

    monkeypatch.setattr(np, "unique", no_recount)
    rig.append([0], [6])
    with pytest.raises(AssertionError, match="whole history"):
        rig.add(Row(SamplingParams(presence_penalty=0.5), [1], [2]))


def test_long_lists_grow_and_keep_what_they_hold() -> None:
    rig = Rig(vocab=500)
    rig.add(Row(SamplingParams(repetition_penalty=1.5, frequency_penalty=0.3), [0]))
    rng = np.random.default_rng(0)
    for token_id in rng.integers(0, 500, 300).tolist():
        rig.append([0], [token_id])
    logits = rng.standard_normal((1, 500)).astype(np.float32)
    np.testing.assert_allclose(rig.edited(logits)[0], expected_logits(logits[0], rig.rows[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", ["allowed_token_ids", "logit_bias"])
def test_ids_the_model_lacks_are_that_rows_error_and_the_row_asks_for_nothing(field: str) -> None:
    rig = Rig()
    value = {VOCAB: 1.0} if field == "logit_bias" else (VOCAB,)
    message = rig.add(Row(SamplingParams(min_tokens=3, **{field: value}), [1], stop_ids=[2]))  # type: ignore[arg-type]
    assert message == f"{field}: token id {VOCAB} is out of range: the model's vocabulary has ids 0 to {VOCAB - 1}"
    logits = random_logits(0, 1)
    np.testing.assert_array_equal(rig.edited(logits.copy()), logits)
