"""Mistakes that serving engines have shipped, one named test each.

They run on the paged fake, whose tokens are read out of its slots: a wrong page gives wrong tokens or an error.
What needs a grammar, a draft, a detokeniser or a server is tested where those live.
"""

import pytest

from mini_vllm.core.block_pool import KVCacheBlock
from mini_vllm.engine.core import EngineCore
from mini_vllm.exceptions import PromptTooLongError
from mini_vllm.request import LoRARequest, Request
from tests.core.harness import (
    PagedExecutor,
    assert_nothing_leaked,
    expected_outputs,
    make_engine,
    make_request,
    make_scheduler,
    run_engine,
)
from tests.core.kv_steps import kv_snapshot


def submit(engine: EngineCore, *requests: Request) -> None:
    for request in requests:
        engine.add_request(request)


def finish(engine: EngineCore, *requests: Request) -> None:
    """Run everything; every request must have got the tokens that an empty engine would give it."""
    run_engine(engine)
    for request in requests:
        assert request.finish_reason in ("stop", "length"), request.error
        assert request.output_token_ids == expected_outputs(request, len(request.output_token_ids))
    assert_nothing_leaked(engine.scheduler)


@pytest.mark.parametrize("num_blocks_of_prompt", [1, 2, 5])
def test_a_full_prefix_hit_on_a_prompt_of_exactly_n_blocks_still_computes_a_token(num_blocks_of_prompt: int) -> None:
    """All n blocks are cached, but the last token's logits are not: its block is computed again."""
    engine, executor = make_engine()
    tokens = list(range(4 * num_blocks_of_prompt))
    submit(engine, make_request("a", tokens))
    run_engine(engine)
    again = make_request("b", tokens)
    submit(engine, again)
    finish(engine, again)
    assert again.num_cached_tokens == 4 * (num_blocks_of_prompt - 1)
    (admission,) = [plan for plan in executor.plans if any(new.req_id == "b" for new in plan.new_reqs)]
    assert admission.num_scheduled_tokens["b"] == 4


def test_a_preempted_request_resumes_on_its_own_orphaned_blocks() -> None:
    """It finds what it wrote before, keeps its outputs, and its later blocks are its own again."""
    engine, executor = make_engine(num_blocks=6)
    a, b = make_request("a", 8, max_tokens=8), make_request("b", 8, max_tokens=12)
    submit(engine, a, b)
    finish(engine, a, b)
    assert b.num_preemptions == 1
    resumed = [new for plan in executor.plans for new in plan.new_reqs if new.req_id == "b"][1]
    assert resumed.num_computed_tokens > 0, "the resumption hit the request's own blocks"
    assert b.num_cached_tokens == 0, "which is no hit of its prompt for the caller"


def test_a_prompt_larger_than_the_pool_is_refused_and_the_engine_lives() -> None:
    engine, _ = make_engine(num_blocks=5)
    running = make_request("a", 4)
    submit(engine, running)
    engine.step()
    with pytest.raises(PromptTooLongError):
        engine.add_request(make_request("big", 1000))
    finish(engine, running)


def test_growth_past_the_pool_ends_that_request_and_the_engine_lives() -> None:
    engine, _ = make_engine(num_blocks=5)
    glutton = make_request("glutton", 4, max_tokens=1000)
    others = [make_request(f"r{i}", 6, max_tokens=5) for i in range(3)]
    submit(engine, glutton, *others)
    finish(engine, *others)
    assert glutton.finish_reason == "error"
    after = make_request("after", 8)
    submit(engine, after)
    finish(engine, after)


@pytest.mark.parametrize("sharing", [True, False])
def test_the_same_prefix_computed_twice_in_one_step_frees_no_page_in_use(sharing: bool) -> None:
    """Two newcomers, one prefix, one step. The first ends at once; the second lives on its pages (or its copy)."""
    engine, _ = make_engine(same_step_prefix_sharing=sharing, num_blocks=24)
    tokens = list(range(16))
    short, long = make_request("short", [*tokens, 1], max_tokens=1), make_request("long", [*tokens, 2], max_tokens=20)
    submit(engine, short, long)
    engine.step()
    assert short.is_finished
    crowd = [make_request(f"r{i}", 12, max_tokens=8) for i in range(6)]
    submit(engine, *crowd)  # whatever was freed is written over now
    finish(engine, short, long, *crowd)


def test_the_same_new_prefix_twice_in_one_step_then_abort_of_the_one_who_wrote_it() -> None:
    engine, _ = make_engine(num_blocks=24)
    tokens = list(range(16))
    pioneer, sharer = make_request("p", [*tokens, 1], max_tokens=20), make_request("s", [*tokens, 2], max_tokens=20)
    submit(engine, pioneer, sharer)
    engine.step()
    engine.abort_requests(["p"])
    crowd = [make_request(f"r{i}", 12, max_tokens=8) for i in range(6)]
    submit(engine, *crowd)
    finish(engine, sharer, *crowd)


@pytest.mark.parametrize("steps_before", [0, 1, 3, 5, 50])
def test_an_abort_in_any_state_leaks_nothing(steps_before: int) -> None:
    """0: waiting; 1: in mid-chunk; 3 and 5: decoding; 50: long finished."""
    engine, executor = make_engine(max_num_batched_tokens=6)
    victim, witness = make_request("victim", 10, max_tokens=6), make_request("witness", 10, max_tokens=6)
    submit(engine, victim, witness)
    for _ in range(steps_before):
        engine.step()
    engine.abort_requests(["victim"])
    engine.abort_requests(["victim"])
    finish(engine, witness)
    engine.step()
    assert victim.finish_reason == ("length" if steps_before == 50 else "abort")
    assert executor.memory.tables == {}, "the worker was told"


def test_prefill_does_not_starve_running_decodes() -> None:
    """A stream of long prompts arrives; the decode that was there first advances in every single step."""
    engine, _ = make_engine(num_blocks=256, max_num_batched_tokens=8)
    decode = make_request("decode", 4, max_tokens=30)
    submit(engine, decode)
    engine.step()
    for i in range(29):
        submit(engine, make_request(f"long{i}", 40, max_tokens=1))
        engine.step()
        assert decode.num_output_tokens == i + 2
    assert decode.is_finished
    run_engine(engine)


def test_priority_preemption_does_not_lose_its_place() -> None:
    """Preempted once, it comes back before everyone of its priority who arrived later."""
    engine, executor = make_engine(num_blocks=5, policy="priority")
    a, b = make_request("a", 8, arrival_time=1.0), make_request("b", 8, arrival_time=2.0)
    submit(engine, a, b)
    engine.step()
    late = [make_request(f"late{i}", 8, arrival_time=3.0 + i) for i in range(3)]
    submit(engine, *late)
    finish(engine, a, b, *late)
    admissions = [new.req_id for plan in executor.plans for new in plan.new_reqs]
    assert admissions[:3] == ["a", "b", "b"]
    assert list(dict.fromkeys(admissions)) == ["a", "b", "late0", "late1", "late2"]


def test_a_different_salt_never_shares_and_the_same_salt_does() -> None:
    engine, _ = make_engine()
    tokens = list(range(12))
    cached = {}
    for name, salt in (("first", "x"), ("other", "y"), ("none", None), ("same", "x")):
        request = make_request(name, tokens, cache_salt=salt)
        submit(engine, request)
        finish(engine, request)
        cached[name] = request.num_cached_tokens
    assert cached == {"first": 0, "other": 0, "none": 0, "same": 8}


def test_different_salts_do_not_share_within_one_step_either() -> None:
    engine, executor = make_engine()
    tokens = list(range(12))
    submit(engine, *(make_request(f"r{i}", tokens, cache_salt=str(i)) for i in range(3)))
    engine.step()
    tables = [set(new.block_ids[0]) for new in executor.plans[0].new_reqs]
    assert not tables[0] & tables[1] and not tables[1] & tables[2] and not tables[0] & tables[2]
    run_engine(engine)


def test_a_salt_equal_to_an_adapter_name_does_not_collide() -> None:
    engine, _ = make_engine()
    tokens = list(range(12))
    adapted = make_request("a", tokens, lora=LoRARequest("sql", "/adapters/sql"))
    salted = make_request("b", tokens, cache_salt="sql")
    both = make_request("c", tokens, lora=LoRARequest("sql", "/adapters/sql"), cache_salt="sql")
    for request in (adapted, salted, both):
        submit(engine, request)
        finish(engine, request)
        assert request.num_cached_tokens == 0


def test_no_hash_is_left_on_a_reused_block() -> None:
    """A pool just large enough: every block is reused for other content before the first prefix comes again."""
    engine, _ = make_engine(num_blocks=5)
    first, other, again = make_request("a", list(range(12))), make_request("b", 13), make_request("c", list(range(12)))
    for request in (first, other, again):
        submit(engine, request)
        finish(engine, request)
    assert again.num_cached_tokens == 0


@pytest.mark.broken_pool
def test_a_hash_left_on_a_reused_block_would_serve_foreign_tokens() -> None:
    """Broken control: without `uncache` on reuse, the third request reads the second one's pages."""
    engine, _ = make_engine(num_blocks=5)
    pool = engine.scheduler.kv.block_pool
    stale: list[KVCacheBlock] = []
    pool.uncache = stale.append  # type: ignore[method-assign,assignment]
    again = make_request("c", list(range(12)))
    for request in (make_request("a", list(range(12))), make_request("b", 13), again):
        submit(engine, request)
        for _ in range(20):
            engine.step()
    assert stale and again.error is not None and "holds other KV" in again.error


def test_an_allocation_that_was_refused_touched_nothing() -> None:
    """Refused at admission, step after step, with hits that nobody else holds: no reference may pile up."""
    engine, _ = make_engine(num_blocks=9)
    prefix = list(range(12))
    warm, holder = make_request("warm", [*prefix, 1], max_tokens=1), make_request("holder", 13, max_tokens=6)
    submit(engine, warm)
    finish(engine, warm)
    submit(engine, holder)
    engine.step()
    head = make_request("head", [*prefix, *range(100, 108)], max_tokens=3)
    submit(engine, head)
    engine.step()
    before = kv_snapshot(engine.scheduler.kv)
    assert head.num_computed_tokens == 0
    plan = engine.scheduler.schedule()
    assert list(plan.num_scheduled_tokens) == ["holder"] and plan.new_reqs == []
    assert kv_snapshot(engine.scheduler.kv)[0] == before[0], "no free block was taken"
    engine.scheduler.undo_step(plan)
    finish(engine, holder, head)


def test_two_engines_side_by_side_share_nothing() -> None:
    """No module state: the same ids in two engines are two requests."""
    engines = [EngineCore(make_scheduler(), PagedExecutor(64, 4)) for _ in range(2)]
    requests = [make_request("same", [i, 2, 3, 4, 5]) for i in range(2)]
    for engine, request in zip(engines, requests, strict=True):
        submit(engine, request)
    for engine, request in zip(engines, requests, strict=True):
        finish(engine, request)
    assert requests[0].output_token_ids != requests[1].output_token_ids


@pytest.mark.parametrize("preemption_policy", ["latest", "least-work"])
def test_one_tenants_crowd_does_not_keep_anothers_one_request_waiting(preemption_policy: str) -> None:
    """First come, first served lets whoever sends most have everything."""
    engine, _ = make_engine(num_blocks=17, policy="fair", preemption_policy=preemption_policy, max_num_seqs=4)
    crowd = [make_request(f"r{i}", 6, max_tokens=6, tenant="crowd") for i in range(200)]
    submit(engine, *crowd)
    for _ in range(5):
        engine.step()
    single = make_request("single", 6, max_tokens=6, tenant="single")
    submit(engine, single)
    for _ in range(14):  # six for the longest of those who run, six of its own, one to be admitted
        engine.step()
    assert single.is_finished and sum(not request.is_finished for request in crowd) > 150
    finish(engine, single, *crowd)


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_two_that_do_not_fit_together_do_not_push_each_other_out_for_ever(policy: str) -> None:
    """Whichever gives way, one of them must get to its end, and then the other."""
    engine, _ = make_engine(
        num_blocks=9, policy=policy, preemption_policy="least-work", enable_caching=False, max_num_batched_tokens=8
    )
    both = [make_request(name, 12, max_tokens=20, tenant=name) for name in "ab"]
    submit(engine, *both)
    finish(engine, *both)
    assert 0 < engine.scheduler.num_preemptions < 10
