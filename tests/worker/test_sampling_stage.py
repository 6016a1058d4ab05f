"""What requests ask of decoding, through a real runner: chunks, resumption, forks, errors, log-probabilities."""

from pathlib import Path

import pytest
import torch

from mini_vllm.core.scheduler_output import ModelRunnerOutput
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.worker import sampling_stage
from mini_vllm.worker.sampling_stage import NO_TOKEN_MESSAGE, SamplingStage
from tests.checkpoints import make_checkpoint
from tests.worker.harness import GREEDY, Hand, make_runner

PROMPT = [5, 17, 9, 40, 3, 22, 8, 31, 12, 6, 28]
HOT = SamplingParams(temperature=1.5, seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stage")
    make_checkpoint(path, family="llama", seed=0, tokenizer=False)
    return path


def fork(hand: Hand, parent: str, children: list[str]) -> ModelRunnerOutput:
    plan = hand.plan({parent: len(hand.tokens[parent])}, [parent])
    plan.forks = {parent: children}
    assert hand.runner.execute_model(plan) is None
    return hand.runner.sample_tokens()


# --- log-probabilities -------------------------------------------------------------------------------------


def prompt_entries(folder: Path, chunks: list[int], others: bool = False) -> list[tuple[list[int], list[float], int]]:
    hand = Hand(make_runner(folder))
    hand.add("p", PROMPT, SamplingParams(temperature=0.0, prompt_logprobs=3))
    if others:
        hand.add("q", PROMPT[::-1], GREEDY)
        hand.step({"q": len(PROMPT)}, ["q"])
    found, new = [], ["p"]
    for chunk in chunks:
        output = hand.step({"p": chunk} | ({"q": 1} if others else {}), new)
        new = []
        if "p" in output.prompt_logprobs:
            assert output.prompt_logprobs["p"].start == len(found) + 1
            found += output.prompt_logprobs["p"].positions
    return [(e.token_ids, e.logprobs, e.rank) for e in found]


@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 1, 6], [10, 1]])
@pytest.mark.parametrize("others", [False, True])
def test_prompt_logprobs_are_the_same_in_any_chunks(
    folder: Path, chunks: list[int], others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_stage, "_PROJECTED_AT_ONCE", 1)  # a row of logits at a time
    found = prompt_entries(folder, chunks, others)
    monkeypatch.undo()
    assert [entry[0][0] for entry in found] == PROMPT[1:]
    for one, other in zip(found, prompt_entries(folder, [11]), strict=True):
        assert one[0] == other[0] and one[2] == other[2]
        assert one[1] == pytest.approx(other[1], abs=1e-4)


def test_prompt_logprobs_are_those_of_the_model(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    found = prompt_entries(folder, [11])
    for position in range(1, len(PROMPT)):
        hand.add(f"r{position}", PROMPT[:position], SamplingParams(temperature=0.0, logprobs=3))
        hand.step({f"r{position}": position}, [f"r{position}"])
        exact = torch.log_softmax(hand.logits[f"r{position}"][0], dim=0)
        assert found[position - 1][1] == pytest.approx(exact[found[position - 1][0]].tolist(), abs=1e-4)
        assert found[position - 1][0][1:] == exact.topk(3).indices.tolist()
        hand.step({}, finished=[f"r{position}"])


def test_a_request_with_outputs_does_not_report_its_prompt_again(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    hand.add("p", PROMPT, SamplingParams(temperature=0.0, prompt_logprobs=0))
    assert "p" in hand.step({"p": 11}, ["p"]).prompt_logprobs
    assert not hand.step({"p": 1}).prompt_logprobs
    hand.step({}, preempted=["p"])
    assert not hand.step({"p": 13}, ["p"]).prompt_logprobs


def test_logprobs_of_sampled_tokens_are_raw_and_only_for_those_that_ask(folder: Path) -> None:
    """Bias, penalty and temperature change what is sampled, not what is reported."""
    hand = Hand(make_runner(folder))
    asked = SamplingParams(
        temperature=0.5, seed=1, logprobs=2, logprob_token_ids=[9, 4], logit_bias={33: 50.0}, presence_penalty=1.0
    )  # type: ignore[arg-type]
    hand.add("a", PROMPT, asked)
    hand.add("b", PROMPT, HOT)
    output = hand.step({"a": 11, "b": 11}, ["a", "b"])
    exact = torch.log_softmax(hand.logits["b"][0], dim=0)
    assert list(output.logprobs) == ["a"]
    (entry,) = output.logprobs["a"]
    assert entry.token_ids == [33, *exact.topk(2).indices.tolist(), 9, 4]
    assert entry.logprobs == pytest.approx(exact[entry.token_ids].tolist(), abs=1e-5)
    assert entry.rank == int((exact >= exact[33]).sum())


# --- several samples ---------------------------------------------------------------------------------------


def test_children_draw_from_the_parents_logits_with_streams_of_their_own(folder: Path) -> None:
    """As if each were a request of its own with that `sample_index`."""
    hand = Hand(make_runner(folder))
    params = SamplingParams(temperature=2.0, seed=7, logprobs=1)
    output = fork(hand, hand.add("p", PROMPT, params), ["p1", "p2", "p3"])
    assert output.req_ids == ["p", "p1", "p2", "p3"] and set(output.logprobs) == set(output.req_ids)
    assert hand.recorder.logits is not None and len(hand.recorder.logits) == 1  # one row was projected
    alone = Hand(make_runner(folder))
    for index, req_id in enumerate(output.req_ids):
        alone.add(req_id, PROMPT, params)
        plan = alone.plan({req_id: len(PROMPT)}, [req_id])
        plan.new_reqs[0].sample_index = index
        expected = alone.run(plan)
        assert expected.sampled_token_ids == [output.sampled_token_ids[index]]
        assert expected.logprobs[req_id][0].token_ids == output.logprobs[req_id][0].token_ids
    assert len({ids[0] for ids in output.sampled_token_ids}) > 1


def test_unseeded_children_keep_the_seed_they_drew_with(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    fork(hand, hand.add("p", PROMPT, SamplingParams(temperature=2.0)), ["p1", "p2"])
    stage = hand.runner.sampling
    drawn = dict(stage._drawn_seeds)
    assert len(set(drawn.values())) == 3
    hand.tokens["p"].append(1)
    hand.add("p1", [*PROMPT, 1], SamplingParams(temperature=2.0))
    hand.step({"p1": 12, "p": 1}, ["p1"])
    assert stage.batch.seed[stage.batch.row_of["p1"]] == drawn["p1"]
    hand.step({"p": 1}, finished=["p1", "p2"])
    assert set(stage._drawn_seeds) == {"p"}


def test_greedy_children_all_get_the_argmax_and_draw_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_vllm.sampling.philox.uniform", None)
    hand = Hand(make_runner(folder))
    output = fork(hand, hand.add("p", PROMPT, GREEDY), ["p1", "p2"])
    assert output.sampled_token_ids == [output.sampled_token_ids[0]] * 3


def test_a_parent_without_a_token_fails_its_children_too(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    params = SamplingParams(temperature=1.0, logprobs=1, logits_processors=(lambda ids, logits: logits * torch.nan,))
    output = fork(hand, hand.add("p", PROMPT, params), ["p1"])
    assert set(output.errors) == {"p", "p1"} and output.sampled_token_ids == [[], []] and not output.logprobs


# --- rules and errors --------------------------------------------------------------------------------------


def run(folder: Path, params: SamplingParams, steps: int = 8, **new: object) -> list[int]:
    hand = Hand(make_runner(folder))
    hand.add("a", PROMPT, params)
    plan = hand.plan({"a": len(PROMPT)}, ["a"])
    for name, value in new.items():
        setattr(plan.new_reqs[0], name, value)
    hand.run(plan)
    for _ in range(steps - 1):
        hand.step({"a": 1})
    return hand.output("a")


def test_what_is_banned_never_comes_and_what_is_allowed_does(folder: Path) -> None:
    plain = run(folder, GREEDY)
    assert plain[0] not in run(folder, GREEDY, bad_words_token_ids=[[plain[0]]])
    phrase = run(folder, GREEDY, bad_words_token_ids=[plain[1:3]])
    assert phrase[:2] == plain[:2] and phrase[2] != plain[2]
    assert set(run(folder, SamplingParams(temperature=0.0, allowed_token_ids=[3, 4]))) <= {3, 4}  # type: ignore[arg-type]
    stops = SamplingParams(temperature=0.0, min_tokens=3)
    held = run(folder, stops, all_stop_token_ids=[plain[0]])
    assert plain[0] not in held[:3]
    assert run(folder, SamplingParams(temperature=0.0, logit_bias={33: 30.0})) == [33] * 8
    tired = run(folder, SamplingParams(temperature=0.0, logit_bias={33: 10.0}, frequency_penalty=2.0), 16)
    assert tired[0] == 33 and tired != [33] * 16


def test_a_resumed_request_is_penalised_for_what_it_had_said(folder: Path) -> None:
    params = SamplingParams(temperature=0.9, seed=3, frequency_penalty=1.0, repetition_penalty=1.2, min_p=0.01)
    plain = run(folder, params, 10)
    hand = Hand(make_runner(folder))
    hand.add("z", PROMPT[::-1], HOT)
    hand.add("a", PROMPT, params)
    hand.step({"z": 11, "a": 11}, ["z", "a"])
    for _ in range(3):
        hand.step({"z": 1, "a": 1})
    hand.step({"z": 1}, preempted=["a"])
    hand.step({"a": len(hand.tokens["a"])}, ["a"], finished=["z"])
    for _ in range(5):
        hand.step({"a": 1})
    assert hand.output("a") == plain


def test_a_request_the_model_cannot_serve_fails_alone_and_says_why(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    hand.add("a", PROMPT, SamplingParams(temperature=0.0, allowed_token_ids=[10**6]))  # type: ignore[arg-type]
    hand.add("b", PROMPT, GREEDY)
    output = hand.step({"a": 11, "b": 11}, ["a", "b"])
    assert list(output.errors) == ["a"] and "allowed_token_ids: token id 1000000 is out of range" in output.errors["a"]
    hand.step({"b": 1}, finished=["a"])
    assert hand.output("b") == run(folder, GREEDY, 2)


def test_a_row_with_nothing_allowed_names_what_it_asked_for(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    hand.add("a", PROMPT, SamplingParams(temperature=0.0, allowed_token_ids=[4], bad_words=["x"]))  # type: ignore[arg-type]
    hand.add("b", PROMPT, GREEDY)
    plan = hand.plan({"a": 11, "b": 11}, ["a", "b"])
    plan.new_reqs[0].bad_words_token_ids = [[4]]
    output = hand.run(plan)
    assert output.errors == {"a": f"{NO_TOKEN_MESSAGE}, or allowed_token_ids, bad_words of the request leave none"}


def test_plain_steps_come_to_what_others_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows that ask for nothing skip the stages, with the same tokens; whoever asks for something does not."""

    def tokens_and_ways(plainly: bool) -> tuple[list[list[int]], list[bool]]:
        ways: list[bool] = []
        whether = SamplingStage._is_plain.fget  # type: ignore[attr-defined]

        def noted(stage: SamplingStage) -> bool:
            ways.append(plainly and whether(stage))
            return ways[-1]

        monkeypatch.setattr(SamplingStage, "_is_plain", property(noted))
        hand = Hand(make_runner(folder))
        hand.add("a", PROMPT, GREEDY)
        hand.add("b", PROMPT[::-1], GREEDY)
        hand.step({"a": 11, "b": 3}, ["a", "b"])
        hand.step({"a": 1, "b": 8})
        for params in (
            HOT,
            SamplingParams(temperature=0.0, presence_penalty=2.0),
            SamplingParams(temperature=0.0, logprobs=1),
        ):
            hand.add("c", PROMPT[3:], params)
            hand.step({"a": 1, "b": 1, "c": 8}, ["c"])
            hand.step({"a": 1, "b": 1}, finished=["c"])
        monkeypatch.undo()
        return [hand.output("a"), hand.output("b")], ways

    plain, ways = tokens_and_ways(True)
    others, _ = tokens_and_ways(False)
    assert plain == others and len(plain[0]) == 8
    assert ways == [True, True] + [False, True] * 3


def test_every_trace_of_a_request_goes_with_its_row(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    params = SamplingParams(logprobs=1, prompt_logprobs=1, presence_penalty=1.0, logit_bias={1: 1.0}, min_tokens=2)
    hand.add("a", PROMPT, params)
    hand.step({"a": 11}, ["a"])
    hand.step({}, finished=["a"])
    stage = hand.runner.sampling
    kept = (stage.params, stage._want_logprobs, stage._want_prompt, stage._refused, stage._drawn_seeds)
    assert not any(kept) and not stage.state.rules and not stage.state.penalties
