"""A real (small, random) model under plans written by hand."""

import random
from pathlib import Path

import pytest
import torch

from mini_vllm.core.scheduler_output import BlockCopy, SchedulerOutput
from mini_vllm.exceptions import ConfigError
from mini_vllm.platforms import Platform
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.worker.buffers import HostBuffer
from mini_vllm.worker.model_runner import ModelRunner
from mini_vllm.worker.sampling_stage import NO_TOKEN_MESSAGE
from tests.checkpoints import make_checkpoint
from tests.worker.harness import GREEDY, NUM_BLOCKS, Hand, make_runner

VOCAB = 128
PROMPTS = {"a": list(range(5, 18)), "b": [99, 3, 7], "c": [64, 2] * 10, "d": [1]}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, tokenizer=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), tokenizer=False)


def alone(folder: Path, tokens: list[int], steps: int, params: SamplingParams = GREEDY) -> list[int]:
    hand = Hand(make_runner(folder))
    return hand.generate([hand.add("x", tokens, params)], steps)[0]


def one_shot_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Logits of the last position when everything is computed in one prefill."""
    hand = Hand(make_runner(folder))
    hand.step({"x": len(tokens)}, [hand.add("x", tokens)])
    return hand.logits["x"][0]


def mixed_run(runner: ModelRunner, *, shuffle: int = 0) -> Hand:
    """Chunked prefills, decodes and late arrivals in the same steps; a finished request's row is filled."""
    order = list(range(1, NUM_BLOCKS))
    random.Random(shuffle).shuffle(order)
    hand = Hand(runner, order)
    for req_id, tokens in PROMPTS.items():
        hand.add(req_id, tokens)
    hand.step({"b": 3, "a": 5}, ["b", "a"])
    hand.step({"b": 1, "a": 5, "c": 9}, ["c"])
    hand.step({"b": 1, "a": 3, "c": 1, "d": 1}, ["d"])
    hand.step({"d": 1, "c": 10, "b": 1, "a": 1})
    hand.step({"a": 1, "c": 1, "d": 1}, finished=["b"])
    for _ in range(6):
        hand.step({"c": 1, "d": 1, "a": 1})
    hand.step({"a": 1, "c": 1})
    return hand


def assert_equals_one_shot(folder: Path, hand: Hand) -> None:
    """At every sampled position of every request."""
    for req_id, rows in hand.logits.items():
        for index, row in enumerate(rows):
            known = hand.tokens[req_id][: hand.prompt[req_id] + index]
            torch.testing.assert_close(row, one_shot_logits(folder, known), rtol=1e-4, atol=1e-4)


# --- the numbers are right ---------------------------------------------------------------------------------


def test_mixed_chunked_prefill_and_decode_equal_one_prefill_at_every_position(any_folder: Path) -> None:
    hand = mixed_run(make_runner(any_folder))
    assert {req_id: len(rows) for req_id, rows in hand.logits.items()} == {"a": 10, "b": 4, "c": 9, "d": 9}
    assert_equals_one_shot(any_folder, hand)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_block_size_and_physical_order_change_no_token(folder: Path, block_size: int) -> None:
    plain = mixed_run(make_runner(folder))
    assert mixed_run(make_runner(folder, block_size=block_size), shuffle=block_size).tokens == plain.tokens


def test_a_wrong_block_in_the_table_shows(folder: Path) -> None:
    """Broken control of the tests above."""
    runner = make_runner(folder)
    hand = mixed_run(runner)
    runner.batch.block_tables[0].np[runner.batch.row_of["a"], 1] = hand.blocks["c"][1]
    hand.step({"a": 1})
    with pytest.raises(AssertionError):
        assert_equals_one_shot(folder, hand)


def poisoned_runner(folder: Path) -> ModelRunner:
    """Every slot is NaN until it is written."""
    runner = make_runner(folder)
    for cache in runner.kv_caches.values():
        cache.fill_(float("nan"))
    return runner


def test_slots_nobody_wrote_are_never_read(folder: Path) -> None:
    assert mixed_run(poisoned_runner(folder)).tokens == mixed_run(make_runner(folder)).tokens


def test_a_poisoned_slot_that_is_read_fails_its_own_request_alone(folder: Path) -> None:
    """Broken control of the test above, and the isolation of rows whose logits are not finite."""
    plain, hand = mixed_run(make_runner(folder)), mixed_run(poisoned_runner(folder))
    never_written = next(hand.free_blocks)
    for name, cache in hand.runner.kv_caches.items():
        hand.runner.layers[name].backend.copy_blocks(cache, [never_written], [hand.blocks["a"][0]])
    output = hand.step({"a": 1, "c": 1})
    assert output.errors == {"a": NO_TOKEN_MESSAGE}
    assert dict(zip(output.req_ids, output.sampled_token_ids, strict=True))["a"] == []
    hand.step({"c": 1}, finished=["a"])
    plain.step({"a": 1, "c": 1})
    plain.step({"c": 1}, finished=["a"])
    assert hand.tokens["c"] == plain.tokens["c"]


class DeviceCopy(HostBuffer):
    """What the host writes reaches the tensor only when it is uploaded, as on an accelerator."""

    def __init__(self, shape: int | tuple[int, ...], dtype: torch.dtype, platform: Platform) -> None:
        super().__init__(shape, dtype, platform)
        self.tensor = torch.full_like(self.host, -1)
        self._viewed = -1


def test_a_device_with_memory_of_its_own_gets_the_same_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mixed_run(make_runner(folder))
    for module in ("input_batch", "prepare_inputs"):
        monkeypatch.setattr(f"mini_vllm.worker.{module}.HostBuffer", DeviceCopy)
    runner = make_runner(folder)
    assert isinstance(runner.batch.block_tables[0].buffer, DeviceCopy)
    assert mixed_run(runner).tokens == plain.tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gives_the_tokens_of_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mixed_run(make_runner(folder))
    monkeypatch.setattr("mini_vllm.platforms._selected", None)
    assert mixed_run(make_runner(folder, device="cuda")).tokens == plain.tokens


# --- rows come and go --------------------------------------------------------------------------------------


def test_neighbours_change_no_token(folder: Path) -> None:
    hand = mixed_run(make_runner(folder))
    for req_id, tokens in PROMPTS.items():
        output = hand.output(req_id)
        assert output == alone(folder, tokens, len(output)), req_id


@pytest.mark.parametrize("gone", ["a", "b", "c"])
def test_the_others_go_on_when_a_row_leaves(folder: Path, gone: str) -> None:
    hand = Hand(make_runner(folder))
    ids = [hand.add(req_id, PROMPTS[req_id]) for req_id in "abc"]
    hand.generate(ids, 3)
    rest = [req_id for req_id in ids if req_id != gone]
    hand.step(dict.fromkeys(rest, 1), finished=[gone])
    hand.step({**dict.fromkeys(rest, 1), hand.add("d", PROMPTS["d"]): 1}, ["d"])
    hand.step(dict.fromkeys([*rest, "d"], 1))
    for req_id in [*rest, "d"]:
        assert hand.output(req_id) == alone(folder, PROMPTS[req_id], len(hand.output(req_id)))


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=5), SamplingParams(top_k=20)])
def test_a_preempted_request_resumes_with_the_same_tokens(folder: Path, params: SamplingParams) -> None:
    """Also without a seed: the one that was drawn for it stays with it."""
    hand = Hand(make_runner(folder))
    hand.generate([hand.add("a", PROMPTS["a"], params), hand.add("b", PROMPTS["b"], params)], 4)
    hand.step({"b": 1}, preempted=["a"])
    hand.step({"a": 9, "b": 1}, ["a"])
    hand.step({"a": 8, "b": 1})
    hand.step({"a": 1, "b": 1})
    other = Hand(make_runner(folder))
    assert other.generate([other.add("a", PROMPTS["a"], params)], 6) == [hand.output("a")]


def test_requests_without_a_seed_differ_from_each_other(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    params = SamplingParams(temperature=3.0)
    first, second = hand.generate([hand.add("x", [1, 2], params), hand.add("y", [1, 2], params)], 8)
    assert first != second
    hand.step({hand.add("x", [1, 2], params): 2}, ["x"], finished=["x", "y"])
    for _ in range(7):
        hand.step({"x": 1})
    assert hand.output("x") != first


def test_a_seed_gives_the_same_tokens_whatever_the_batch_and_the_chunks(folder: Path) -> None:
    params = SamplingParams(temperature=1.5, top_k=50, top_p=0.95, seed=-3)
    hand = Hand(make_runner(folder))
    hand.step({hand.add("n", [9, 8, 7], SamplingParams(seed=1)): 3}, ["n"])
    hand.step({"n": 1, hand.add("x", PROMPTS["a"], params): 6}, ["x"])
    hand.step({"x": 7})
    for _ in range(5):
        hand.step({"x": 1, "n": 1})
    assert hand.output("x") == alone(folder, PROMPTS["a"], 6, params)
    assert hand.output("x") != alone(folder, PROMPTS["a"], 6, SamplingParams(temperature=1.5, seed=-4))


def test_a_plan_may_repeat_who_left(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    hand.generate([hand.add("a", PROMPTS["a"]), hand.add("b", PROMPTS["b"])], 2)
    hand.step({"b": 1}, finished=["a"])
    hand.step({"b": 1}, finished=["a", "never seen"], preempted=["a"])
    assert hand.output("b") == alone(folder, PROMPTS["b"], 4)


# --- block copies ------------------------------------------------------------------------------------------


def fork(hand: Hand, parent: str, child: str, copied: int) -> None:
    """The child knows what the parent knows; the parent's last block is to be copied to `copied`."""
    hand.add(child, hand.tokens[parent])
    hand.computed[child] = hand.computed[parent]
    hand.blocks[child] = [*hand.blocks[parent][:-1], copied]


def test_a_child_continues_on_its_copy_of_the_partial_block(folder: Path) -> None:
    hand = Hand(make_runner(folder), range(1, 40))
    hand.generate([hand.add("a", PROMPTS["a"])], 2)
    tail = hand.blocks["a"][-1]
    fork(hand, "a", "child", 50)
    fork(hand, "child", "grandchild", 51)
    copies = [BlockCopy(0, tail, 50), BlockCopy(0, 50, 51)]  # the second reads what the first wrote
    hand.step({"a": 1, "child": 1, "grandchild": 1}, ["child", "grandchild"], copies=copies)
    for _ in range(4):
        hand.step({"a": 1, "child": 1, "grandchild": 1})
    expected = alone(folder, PROMPTS["a"], 7)
    assert hand.output("a") == expected
    assert hand.output("child") == hand.output("grandchild") == expected[2:]


def test_a_missing_block_copy_shows(folder: Path) -> None:
    """Broken control: without the copy the child reads slots that nobody wrote."""
    hand = Hand(poisoned_runner(folder), range(1, 40))
    hand.generate([hand.add("a", PROMPTS["a"])], 2)
    fork(hand, "a", "child", 50)
    assert list(hand.step({"a": 1, "child": 1}, ["child"]).errors) == ["child"]


# --- which rows get logits, and which tokens they may take --------------------------------------------------


def test_logits_are_computed_for_the_rows_that_sample_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(folder, enforce_eager=True)
    heights = []
    compute = runner.model.compute_logits
    monkeypatch.setattr(runner.model, "compute_logits", lambda h: heights.append(len(h)) or compute(h))
    hand = Hand(runner)
    hand.step({hand.add("a", PROMPTS["a"]): 5, hand.add("b", PROMPTS["b"]): 3}, ["a", "b"])
    hand.step({"a": 4})
    hand.step({"a": 4, "b": 1})
    assert heights == [1, 2]


def test_a_step_in_the_middle_of_a_prompt_is_done_without_sampling(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    output = hand.runner.execute_model(hand.plan({hand.add("a", PROMPTS["a"]): 5}, ["a"]))
    assert output is not None
    assert (output.req_ids, output.sampled_token_ids) == (["a"], [[]])
    with pytest.raises(RuntimeError, match=r"sample_tokens\(\) without"):
        hand.runner.sample_tokens()


def test_ids_the_tokenizer_does_not_know_are_never_sampled(folder: Path) -> None:
    params = SamplingParams(temperature=50.0)
    outputs = {}
    for known in (None, 10):
        hand = Hand(make_runner(folder, tokenizer_vocab_size=known))
        ids = [hand.add(str(i), [i + 1], GREEDY if i < 2 else params) for i in range(8)]
        outputs[known] = {token for tokens in hand.generate(ids, 12) for token in tokens}
    assert max(outputs[10]) < 10
    assert max(outputs[None]) >= 10  # broken control: without the mask they do come up


def test_a_row_with_nothing_allowed_fails_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(folder, enforce_eager=True)
    hand = Hand(runner)
    ids = [hand.add(req_id, PROMPTS[req_id]) for req_id in "abc"]
    hand.generate(ids, 2)
    compute = runner.model.compute_logits

    def forbid_b(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        logits[runner.batch.row_of["b"]] = -torch.inf
        return logits

    monkeypatch.setattr(runner.model, "compute_logits", forbid_b)
    assert list(hand.step(dict.fromkeys(ids, 1)).errors) == ["b"]
    monkeypatch.undo()
    hand.step({"a": 1, "c": 1}, finished=["b"])
    for req_id in "ac":
        assert hand.output(req_id) == alone(folder, PROMPTS[req_id], 4)


# --- steps that do nothing, or fail -------------------------------------------------------------------------


def test_a_plan_with_only_departures_runs_no_forward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(make_runner(folder, enforce_eager=True))
    hand.generate([hand.add("a", PROMPTS["a"])], 2)
    monkeypatch.setattr(hand.runner.model, "forward", lambda *args: pytest.fail("ran"))
    output = hand.runner.execute_model(SchedulerOutput(finished_req_ids=["a"]))
    assert output is not None
    assert (output.req_ids, output.sampled_token_ids, output.errors) == ([], [], {})
    assert hand.runner.batch.num_rows == 0


def test_after_a_failed_forward_the_runner_serves_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(make_runner(folder, enforce_eager=True))
    hand.generate([hand.add("a", PROMPTS["a"])], 2)

    def fail(*args: object) -> None:
        raise MemoryError("made to fail")

    monkeypatch.setattr(hand.runner.model, "forward", fail)
    with pytest.raises(MemoryError):
        hand.step({"a": 1, hand.add("b", PROMPTS["b"]): 3}, ["b"])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="sample_tokens"):
        hand.runner.sample_tokens()
    hand.step({hand.add("c", PROMPTS["c"]): 20}, ["c"], finished=["a", "b"])
    hand.step({"c": 1})
    assert hand.runner.batch.req_ids == ["c"]
    assert hand.output("c") == alone(folder, PROMPTS["c"], 2)


def test_a_grammar_is_refused_rather_than_ignored(folder: Path) -> None:
    hand = Hand(make_runner(folder))
    assert hand.runner.execute_model(hand.plan({hand.add("a", PROMPTS["a"]): 13}, ["a"])) is None
    with pytest.raises(ConfigError, match="grammar_output"):
        hand.runner.sample_tokens(object())


def test_a_plan_that_survived_serialisation_means_the_same(folder: Path) -> None:
    import msgspec

    hand = Hand(make_runner(folder))
    plan = hand.plan({hand.add("a", PROMPTS["a"]): 13}, ["a"])
    hand.run(msgspec.json.decode(msgspec.json.encode(plan), type=SchedulerOutput))
    assert hand.output("a") == alone(folder, PROMPTS["a"], 1)
