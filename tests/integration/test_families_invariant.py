"""The master invariant over every family: no way of serving a request changes its tokens.

A subset of test_master_invariant.py, which has the broken controls of the rig itself, over the rows of
tests/families.py that are marked for it: tokens equal those each job gets alone, in one piece, in a roomy engine
without prefix cache. One more control here shows that the families' own layers are inside the comparison.
"""

import random
from collections.abc import Callable

import pytest
import torch

from mini_vllm.layers.attention import Attention
from tests.families import BY_NAME, FAMILIES
from tests.integration.rig import Job, Rig, greedy, run, sampled, tokens

NAMES = [family.name for family in FAMILIES if family.invariant]
every_family = pytest.mark.parametrize("name", NAMES)
BLOCK_SIZE = 8
NUM_TOKENS = 8


def make_jobs() -> list[Job]:
    """Longer and shorter than every window, prefixes shared and not, exactly n blocks, greedy and seeded."""
    rng = random.Random(11)
    shared = tokens(rng, 35)
    return [
        Job(shared + tokens(rng, 37), greedy(NUM_TOKENS)),
        Job(shared + tokens(rng, 3), sampled(1, NUM_TOKENS)),
        Job(shared[:32], greedy(NUM_TOKENS)),
        Job(tokens(rng, 1), sampled(2, NUM_TOKENS)),
    ]


JOBS = make_jobs()
LONGEST = max(len(job.prompt) for job in JOBS) + NUM_TOKENS
MAX_MODEL_LEN = 96
"""Beyond the original context of the scaled rows, within every pool below: the rotary choice is the same in all."""
Served = tuple[Rig, list[list[int]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, load_once: None) -> Callable[[str], Served]:
    """A family's rig, and what each job gets alone."""
    made: dict[str, Served] = {}

    def get(name: str) -> Served:
        if name not in made:
            rig = Rig(BY_NAME[name].write(tmp_path_factory.mktemp(name), seed=3), MAX_MODEL_LEN)
            made[name] = rig, [run(rig.engine(caching=False), [job]).tokens[0] for job in JOBS]
        return made[name]

    return get


@every_family
def test_the_reference_is_worth_comparing_with(served: Callable[[str], Served], name: str) -> None:
    _, reference = served(name)
    assert [len(ids) for ids in reference] == [NUM_TOKENS] * len(JOBS)
    assert len({tuple(ids) for ids in reference}) == len(JOBS)


@every_family
@pytest.mark.parametrize(("budget", "threshold"), [(3, 0), (24, 7), (2048, 5)])
def test_any_budget_and_threshold_give_the_same_tokens(
    served: Callable[[str], Served], name: str, budget: int, threshold: int
) -> None:
    rig, reference = served(name)
    assert run(rig.engine(budget=budget, threshold=threshold), JOBS).tokens == reference


@every_family
@pytest.mark.parametrize("block_size", [1, 32])
def test_any_block_size_and_placement_give_the_same_tokens(
    served: Callable[[str], Served], name: str, block_size: int
) -> None:
    rig, reference = served(name)
    assert run(rig.engine(block_size=block_size, num_blocks=400, shuffle=block_size), JOBS).tokens == reference


@every_family
def test_a_cold_and_a_warm_prefix_cache_give_the_same_tokens(served: Callable[[str], Served], name: str) -> None:
    rig, reference = served(name)
    engine = rig.engine(block_size=BLOCK_SIZE, max_num_seqs=2)
    cold, warm = run(engine, JOBS), run(engine, JOBS)
    assert cold.tokens == warm.tokens == reference
    assert cold.cached_tokens[2] > 0
    assert warm.cached_tokens == [(len(job.prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for job in JOBS]


@every_family
def test_a_pool_that_forces_preemptions_gives_the_same_tokens(served: Callable[[str], Served], name: str) -> None:
    rig, reference = served(name)
    engine = rig.engine(block_size=BLOCK_SIZE, num_blocks=1 + MAX_MODEL_LEN // BLOCK_SIZE, budget=40, caching=False)
    outcome = run(engine, [JOBS[1], JOBS[0], JOBS[2]])
    assert outcome.num_preemptions > 0
    assert outcome.tokens == [reference[1], reference[0], reference[2]]
    assert engine.executor.max_model_len == MAX_MODEL_LEN, "a smaller limit could mean other rotary frequencies"


@every_family
def test_control_a_layer_that_mixes_up_its_neighbours_is_seen(
    served: Callable[[str], Served], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention of the last layer reads the first one's cache."""
    rig, reference = served(name)
    engine = rig.engine(enforce_eager=True)
    caches = engine.executor.runner.kv_caches  # type: ignore[attr-defined]
    first, *_, last = caches
    forward = Attention.forward

    def mixed_up(self: Attention, *args: torch.Tensor) -> torch.Tensor:
        output = forward(self, *args)
        if self.prefix == last:
            caches[last].copy_(caches[first])
        return output

    monkeypatch.setattr(Attention, "forward", mixed_up)
    assert run(engine, JOBS).tokens != reference
