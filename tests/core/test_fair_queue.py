"""The policy `fair`: who is served how much, however many requests the others have."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_vllm.core import fair_queue
from mini_vllm.core.fair_queue import FairQueue
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import SchedulerOutput
from mini_vllm.request import Request, RequestStatus
from tests.core.harness import (
    assert_nothing_leaked,
    expected_outputs,
    fake_result,
    make_engine,
    make_request,
    make_scheduler,
    run_all,
    run_engine,
    run_step,
)


def add(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.add_request(request)


def ids(requests: "FairQueue | list[Request]") -> list[str]:
    return [request.request_id for request in requests]


def admissions(plans: list[SchedulerOutput]) -> list[str]:
    return [new.req_id for plan in plans for new in plan.new_reqs]


def flood(tenant: str, count: int, length: int = 8, max_tokens: int = 4, user: str = "") -> list[Request]:
    """One tenant's requests, `<tenant><user>0` and so on."""
    return [
        make_request(f"{tenant}{user}{i}", length, max_tokens=max_tokens, tenant=tenant, user=user)
        for i in range(count)
    ]


def service(requests: list[Request]) -> Counter[str]:
    """Tokens computed and sampled for each tenant's name."""
    served: Counter[str] = Counter()
    for request in requests:
        served[request.tenant.name] += request.num_computed_tokens + request.num_output_tokens
    return served


# -- nobody is starved ----------------------------------------------------------------------------------------


def steps_until_first_token(policy: str) -> int:
    """How long a newcomer's one prompt waits behind another's thousand, of which four run at a time."""
    scheduler = make_scheduler(policy=policy, num_blocks=64, max_num_seqs=4)
    add(scheduler, *flood("greedy", 1000))
    for _ in range(10):
        run_step(scheduler)
    (single,) = flood("modest", 1)
    add(scheduler, single)
    steps = 0
    while not single.output_token_ids:
        run_step(scheduler)
        steps += 1
    scheduler.finish_requests(list(scheduler.requests), RequestStatus.FINISHED_ABORTED)
    assert_nothing_leaked(scheduler)
    return steps


def test_one_tenants_thousand_prompts_do_not_starve_anothers_one() -> None:
    """Its turn comes as soon as one of the four is done, which takes four steps at most; then its own step."""
    assert steps_until_first_token("fair") <= 5
    assert steps_until_first_token("fcfs") > 900, "broken control: without fairness it waits for all of them"


@pytest.mark.parametrize("preemption_policy", ["latest", "least-work"])
def test_a_crowd_of_tenants_on_a_tiny_pool_all_end_with_the_right_tokens(preemption_policy: str) -> None:
    engine, _ = make_engine(num_blocks=9, policy="fair", preemption_policy=preemption_policy, max_num_batched_tokens=16)
    requests = [
        make_request(f"r{i}", 3 + 5 * (i % 4), max_tokens=5 + 3 * (i % 4), tenant=f"t{i % 3}", user=f"u{i % 2}")
        for i in range(40)
    ]
    for request in requests:
        engine.add_request(request)
    run_engine(engine)
    assert engine.scheduler.num_preemptions > 20
    for request in requests:
        assert request.output_token_ids == expected_outputs(request, request.max_tokens or 0)
    assert_nothing_leaked(engine.scheduler)


# -- shares -----------------------------------------------------------------------------------------------------


def shares(weights: dict[str, float], make: Callable[[str], list[Request]], steps: int = 600) -> dict[str, float]:
    """Each tenant's part of the service while all have more to do than the engine can."""
    scheduler = make_scheduler(
        policy="fair", num_blocks=200, max_num_seqs=4, max_num_batched_tokens=16, tenant_weights=weights,
        enable_caching=False,
    )  # fmt: skip
    requests = [request for tenant in weights for request in make(tenant)]
    add(scheduler, *requests)
    for _ in range(steps):
        plan = scheduler.schedule()
        scheduler.update_from_output(plan, fake_result(scheduler, plan))
    assert {r.tenant.name for r in scheduler.waiting} == set(weights), "somebody ran out of work"
    served = service(requests)
    scheduler.finish_requests(list(scheduler.requests), RequestStatus.FINISHED_ABORTED)
    return {tenant: served[tenant] / sum(served.values()) for tenant in weights}


@pytest.mark.parametrize("weights", [{"a": 1, "b": 1}, {"a": 1, "b": 3}, {"a": 0.5, "b": 1, "c": 2.5}])
def test_tenants_get_what_their_weights_say_within_four_percent(weights: dict[str, float]) -> None:
    got = shares(weights, lambda tenant: flood(tenant, 700))
    for tenant, weight in weights.items():
        assert got[tenant] == pytest.approx(weight / sum(weights.values()), abs=0.04)


def test_long_prompts_and_long_answers_buy_no_larger_share() -> None:
    """Tokens count, not requests: one asks for long prompts, one for long outputs, one for crumbs."""
    shapes = {"prompts": (60, 1), "outputs": (4, 30), "crumbs": (2, 2)}
    got = shares(
        dict.fromkeys(shapes, 1.0), lambda name: flood(name, 900, length=shapes[name][0], max_tokens=shapes[name][1])
    )
    assert all(share == pytest.approx(1 / 3, abs=0.05) for share in got.values()), got


def test_many_users_get_a_name_no_more_than_one() -> None:
    def requests(tenant: str) -> list[Request]:
        if tenant == "one":
            return flood("one", 500)
        return [request for i in range(60) for request in flood("many", 8, user=f"u{i}-")]

    got = shares({"one": 1, "many": 1}, requests)
    assert got["one"] == pytest.approx(0.5, abs=0.04)


def test_users_of_one_name_share_what_the_name_gets() -> None:
    scheduler = make_scheduler(policy="fair", num_blocks=200, max_num_seqs=1)
    add(scheduler, *flood("key", 50, user="busy"), *flood("key", 2, user="calm"), *flood("other", 3))
    assert admissions(run_all(scheduler))[:8] == [
        "keybusy0", "other0", "keycalm0", "other1", "keybusy1", "other2", "keycalm1", "keybusy2",
    ]  # fmt: skip


def test_the_same_user_under_another_name_is_somebody_else() -> None:
    queue = FairQueue()
    mine, theirs = (make_request(f"of {name}", 4, tenant=name, user="bob") for name in ("a", "b"))
    queue.add(mine)
    queue.add(theirs)
    queue.charge(mine, 1000)
    assert ids(queue) == ["of b", "of a"]


def test_within_a_user_it_is_first_come_first_served() -> None:
    scheduler = make_scheduler(policy="fair", max_num_seqs=2)
    add(scheduler, *flood("a", 9))
    assert admissions(run_all(scheduler)) == [f"a{i}" for i in range(9)]


# -- what is charged --------------------------------------------------------------------------------------------


def charged(*requests: Request, **config: object) -> dict[str, int]:
    """Tokens charged to each request while all of them run to their end, one after the other."""
    scheduler = make_scheduler(policy="fair", max_num_seqs=1, **config)
    total: Counter[str] = Counter()
    queue = scheduler.waiting
    charge = queue.charge

    def count(request: Request, num_tokens: int) -> None:
        total[request.request_id] += num_tokens
        charge(request, num_tokens)

    queue.charge = count  # type: ignore[method-assign]
    add(scheduler, *requests)
    run_all(scheduler)
    return dict(total)


def test_a_token_of_the_prompt_costs_one_and_a_sampled_one_two() -> None:
    """The first comes with the last of the prompt; the last is never computed: 8 + 5 + 4."""
    assert charged(make_request("a", 8, max_tokens=5)) == {"a": 8 + 5 + 4}
    assert charged(make_request("a", 8, max_tokens=5), max_num_batched_tokens=3) == {"a": 8 + 5 + 4}


def test_tokens_out_of_the_prefix_cache_cost_nothing() -> None:
    prompt = list(range(13))
    both = make_request("a", prompt, max_tokens=1), make_request("b", prompt, max_tokens=1)
    assert charged(*both) == {"a": 13 + 1, "b": 1 + 1}


def test_what_a_victim_gave_back_in_the_same_plan_is_not_charged() -> None:
    scheduler = make_scheduler(policy="fair", num_blocks=5)
    old, new = make_request("old", 8, tenant="a", max_tokens=9), make_request("new", 8, tenant="b", max_tokens=9)
    add(scheduler, old, new)
    run_step(scheduler)
    queue = scheduler.waiting
    assert isinstance(queue, FairQueue)
    before = queue.standing(new)[0]
    plan = run_step(scheduler)
    assert plan.preempted_req_ids == ["new"] and plan.num_scheduled_tokens == {"old": 1}
    assert (queue.standing(old)[0], queue.standing(new)[0]) == (before + 2, before)
    run_all(scheduler)


# -- idling earns nothing, coming back resets nothing --------------------------------------------------------------


def test_who_comes_late_is_served_no_more_than_who_was_there() -> None:
    scheduler = make_scheduler(policy="fair", num_blocks=400, max_num_seqs=4, enable_caching=False)
    early, late = flood("early", 600), flood("late", 600)
    add(scheduler, *early)
    for _ in range(300):
        run_step(scheduler)
    before = service(early)["early"]
    add(scheduler, *late)
    for _ in range(200):
        run_step(scheduler)
    got, since = service(late)["late"], service(early)["early"] - before
    assert got == pytest.approx(since, rel=0.1), "the 300 steps of idling gave no credit"
    scheduler.finish_requests(list(scheduler.requests), RequestStatus.FINISHED_ABORTED)


def test_leaving_and_coming_back_does_not_reset_what_one_was_served() -> None:
    queue = FairQueue()
    rival = make_request("rival", 4, tenant="rival")
    queue.add(rival)
    for i in range(5):
        request = make_request(f"r{i}", 4, tenant="hopper")
        queue.add(request)
        queue.charge(request, 100)
        queue.remove(request)
    queue.add(make_request("again", 4, tenant="hopper"))
    assert ids(queue) == ["rival", "again"]
    assert queue.standing(make_request("x", 4, tenant="hopper"))[0] == 500


def test_counters_of_tenants_that_went_away_are_forgotten() -> None:
    """As soon as those who wait have been served as much; a crowd of users with one request each leaves nothing."""
    scheduler = make_scheduler(policy="fair", max_num_seqs=4)
    add(scheduler, *(flood(f"t{i}", 1, user=f"u{i}")[0] for i in range(300)))
    run_all(scheduler)
    queue = scheduler.waiting
    assert isinstance(queue, FairQueue)
    assert len(queue._members) <= 4 and len(queue._idle) <= 4 and len(queue._heap) < 50


def test_idle_counters_are_bounded_even_when_nobody_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "MAX_IDLE_COUNTERS", 10)
    queue = FairQueue()
    queue.add(make_request("stuck", 4, tenant="stuck"))
    for i in range(500):
        request = make_request(f"r{i}", 4, tenant=f"t{i}")
        queue.add(request)
        queue.charge(request, 1 + i)
        queue.remove(request)
    assert len(queue._members) <= 11 and len(queue._heap) < 60
    assert queue.peek().request_id == "stuck"


def test_an_aborted_crowd_leaves_no_trace_while_the_head_never_moves() -> None:
    queue = FairQueue()
    queue.add(make_request("head", 4, tenant="head"))
    for i in range(1000):
        request = make_request(f"r{i}", 4, tenant=f"t{i}")
        queue.add(request)
        queue.remove(request)
    assert ids(queue) == ["head"] and len(queue) == 1
    assert len(queue._members) == 1 and len(queue._heap) < 60 and len(queue._idle) < 60


def test_who_comes_when_nobody_waits_starts_where_the_last_one_admitted_is() -> None:
    queue = FairQueue()
    first = make_request("first", 4, tenant="first")
    queue.add(first)
    queue.pop()
    queue.charge(first, 1000)
    newcomer = make_request("newcomer", 4, tenant="newcomer")
    queue.add(newcomer)
    assert queue.standing(newcomer)[0] == queue.standing(first)[0] == 1000


# -- giving way -------------------------------------------------------------------------------------------------


def test_the_latest_of_the_tenant_served_most_gives_way() -> None:
    queue = FairQueue()
    oldest, heavy1, heavy2, light = (
        make_request(name, 4, tenant=tenant)
        for name, tenant in [("oldest", "heavy"), ("h1", "heavy"), ("h2", "heavy"), ("light", "light")]
    )
    running = [oldest, heavy1, heavy2, light]
    for index, request in enumerate(running):
        request.arrival_index = index
        queue.add(request)
        queue.pop()
    queue.charge(oldest, 50)
    queue.charge(light, 20)
    assert queue.pick_victim(running) is heavy2
    queue.charge(light, 100)
    assert queue.pick_victim(running) is light
    assert queue.pick_victim([oldest, light]) is light and queue.pick_victim([light]) is light
    queue.charge(heavy1, 500)
    assert queue.pick_victim([oldest, light]) is light, "the earliest of all is spared, whoever it belongs to"


def test_a_preempted_request_keeps_its_place_and_its_tenant_its_turn() -> None:
    queue = FairQueue()
    requests = [make_request(f"a{i}", 4, tenant="a") for i in range(4)]
    other = make_request("other", 4, tenant="b")
    for index, request in enumerate([*requests, other]):
        request.arrival_index = index
        queue.add(request)
    taken = [queue.pop() for _ in range(3)]
    queue.charge(other, 100)
    for request in taken:  # in any order
        queue.requeue(request)
    assert [rid for rid in ids(queue) if rid != "other"] == ["a0", "a1", "a2", "a3"]
    assert ids(queue)[-1] == "other"


# -- against a plain model ---------------------------------------------------------------------------------------

OPERATIONS = st.lists(
    st.tuples(st.sampled_from("aaapprcd"), st.integers(0, 3), st.integers(0, 2), st.integers(0, 30)), max_size=80
)


class PlainFairQueue:
    """The same promises, kept by looking at everything each time."""

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.served: dict[tuple[str, ...], float] = {}

    def keys(self, request: Request) -> list[tuple[str, ...]]:
        return [(request.tenant.name,), (request.tenant.name, request.tenant.user)]

    def lowest(self, level: int, name: str | None) -> float | None:
        keys = {self.keys(r)[level] for r in self.waiting if name is None or r.tenant.name == name}
        return min((self.served[key] for key in keys), default=None)

    def check_head(self, head: Request) -> None:
        """Its name is served least of all that wait, its user least of the name's, and it is the user's first."""
        assert self.served[self.keys(head)[0]] == self.lowest(0, None)
        assert self.served[self.keys(head)[1]] == self.lowest(1, head.tenant.name)
        mates = [r for r in self.waiting if r.tenant == head.tenant]
        assert head is min(mates, key=lambda r: r.arrival_index)


@given(OPERATIONS)
def test_the_head_is_always_who_was_served_least(operations: list[tuple[str, int, int, int]]) -> None:
    """a: add, p: admit, r: preempt, c: charge, d: end. The model reads counters only through `standing`."""
    queue, model = FairQueue(), PlainFairQueue()
    for number, (operation, name, user, amount) in enumerate(operations):
        if operation == "a":
            request = make_request(f"r{number}", 1, tenant=f"n{name}", user=f"u{user}")
            request.arrival_index = number
            queue.add(request)
            model.waiting.append(request)
        elif operation == "p" and model.waiting:
            request = queue.pop()
            model.waiting.remove(request)
            model.running.append(request)
        elif operation in "rc" and model.running:
            request = model.running[amount % len(model.running)]
            if operation == "c":
                before = queue.standing(request)
                queue.charge(request, amount)
                assert queue.standing(request) == tuple(value + amount for value in before)
            else:
                model.running.remove(request)
                model.waiting.append(request)
                queue.requeue(request)
        elif operation == "d" and model.running + model.waiting:
            everyone = model.running + model.waiting
            request = everyone[amount % len(everyone)]
            queue.remove(request)
            (model.running if request in model.running else model.waiting).remove(request)
        for request in model.waiting:
            standing = queue.standing(request)
            model.served |= dict(zip(model.keys(request), standing, strict=True))
        assert len(queue) == len(model.waiting) and set(ids(queue)) == set(ids(model.waiting))
        if model.waiting:
            model.check_head(queue.peek())
            assert next(iter(queue)) is queue.peek(), "listing begins with the head"
        else:
            with pytest.raises(IndexError):
                queue.peek()


# -- mistakes that these tests must notice --------------------------------------------------------------------------


def no_lift(patch: pytest.MonkeyPatch) -> None:
    """Idling is saved up."""
    patch.setattr(FairQueue, "_floor", lambda self: 0.0)


def no_charge(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FairQueue, "charge", lambda self, request, num_tokens: None)


def stale_heap(patch: pytest.MonkeyPatch) -> None:
    """Entries are never put right."""
    patch.setattr(FairQueue, "_next", lambda self: self._heap[0][2])


def forgets_at_once(patch: pytest.MonkeyPatch) -> None:
    """Whoever leaves for a moment is a newcomer."""
    patch.setattr(FairQueue, "_retire", lambda self, member: self._members.pop(member.key))


CLAIMS: dict[Callable[[pytest.MonkeyPatch], None], Callable[[], None]] = {
    no_lift: test_who_comes_late_is_served_no_more_than_who_was_there,
    no_charge: test_one_tenants_thousand_prompts_do_not_starve_anothers_one,
    stale_heap: test_the_head_is_always_who_was_served_least,
    forgets_at_once: test_leaving_and_coming_back_does_not_reset_what_one_was_served,
}


@pytest.mark.broken_pool
@pytest.mark.parametrize("breakage", CLAIMS)
def test_a_broken_queue_is_noticed(
    breakage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breakage(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 (whichever assertion comes first)
        CLAIMS[breakage]()
