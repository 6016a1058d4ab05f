"""What is asked of the simulated engine: requests with a time, a prompt and an output length.

A `Workload` is a recipe and can be run any number of times; `start()` gives a `Source` that hands out requests in
order of time, and is told of each finish, since the next turn of a chat or of a user in a closed system waits for it.
All randomness comes from one seed, in separate streams: another rate or another mix of tenants leaves the lengths as
they were.

Prompts are runs of token ids, written out only when a request arrives. Every request has ids of its own, so two
prompts never share a block unless they share it on purpose: a prefix of their group, the history of their chat, or the
same `hash_ids` in a trace.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.arrivals import arrival_times, check_arrivals
from mini_vllm.simulator.lengths import Lengths, parse_lengths

SHARED_IDS = 2**31
"""Token ids from here on are of shared prefixes, below of single requests. Both fit the hash's 32 bits."""

Run = tuple[int, int]
"""(token id, how often it is repeated)."""


@dataclass(slots=True)
class SimRequest:
    """One request. arrival: seconds. token_id: what it generates, again and again; with several samples, the ids from
    there on. conversation: what its finish may continue."""

    index: int
    arrival: float
    runs: tuple[Run, ...]
    output_len: int
    token_id: int
    tenant: str = ""
    user: str = ""
    priority: int = 0
    num_samples: int = 1
    conversation: "Conversation | None" = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(count for _, count in self.runs)

    def prompt_token_ids(self) -> list[int]:
        """The prompt, written out."""
        token_ids: list[int] = []
        for token_id, count in self.runs:
            token_ids += [token_id] * count
        return token_ids


class Source(Protocol):
    """A workload under way."""

    def next_time(self) -> float:
        """When the next request known so far arrives; infinite when there is none."""

    def pop(self) -> SimRequest:
        """That request."""

    def finished(self, request: SimRequest, time: float) -> None:
        """It ended at `time`."""


class Workload(Protocol):
    """A recipe. num_requests: that `start()` will hand out. tenants: the names they come from."""

    @property
    def num_requests(self) -> int: ...

    @property
    def tenants(self) -> Sequence[str]: ...

    def describe(self) -> dict[str, Any]:
        """For people and for JSON."""

    def start(self) -> Source: ...


@dataclass(frozen=True, kw_only=True)
class TenantMix:
    """One tenant's part. share: of the conversations, relative to the others. users: that it has, equally busy.

    prompt_len, output_len: its own in place of the workload's.
    """

    name: str
    share: float = 1.0
    prompt_len: str | None = None
    output_len: str | None = None
    priority: int = 0
    users: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise ConfigError(f"tenants: the share of {self.name!r} must be above 0, got {self.share!r}")
        if self.users < 1:
            raise ConfigError(f"tenants: {self.name!r} must have at least 1 user, got {self.users}")


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """Raises `ConfigError` naming the field.

    num_requests: in all, every turn counted. arrivals: 'poisson', 'gamma', 'fixed' (all with `rate` conversations per
    second), 'at-once', or 'closed' (`users`, each of whom sends the next request when the last is answered).
    think_time: mean seconds before a next turn or a user's next conversation, exponentially distributed.
    prompt_len, output_len, turns: as `lengths.py` reads them. A turn's prompt is new text after the history.
    shared_prefix_tokens: come before the prompt's own; each conversation belongs to one of `num_prefix_groups`, with
    probability in proportion to rank^-prefix_skew.
    trace: replay this file; then only `num_requests` (as a limit), `trace_speed` and `think_time`-free fields count.
    """

    num_requests: int | None = None
    arrivals: str | None = None
    rate: float | None = None
    burstiness: float = 1.0
    users: int | None = None
    think_time: float = 0.0
    prompt_len: str = "512"
    output_len: str = "128"
    turns: str = "1"
    shared_prefix_tokens: int = 0
    num_prefix_groups: int = 1
    prefix_skew: float = 0.0
    tenants: tuple[TenantMix, ...] = ()
    trace: str | None = None
    trace_speed: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests is not None and self.num_requests < 1:
            raise ConfigError(f"num_requests: must be at least 1, got {self.num_requests}")
        if self.seed < 0:
            raise ConfigError(f"seed: must be at least 0, got {self.seed}")
        if not 0 < self.trace_speed < math.inf:
            raise ConfigError(f"trace_speed: must be above 0, got {self.trace_speed!r}")
        if self.trace is not None:
            self._check_replay()
            return
        if self.trace_speed != 1.0:
            raise ConfigError("trace_speed: has no meaning without a trace")
        check_arrivals(self.arrival_kind, self.rate, self.burstiness)
        self._check_users()
        self._check_prefixes()
        names = [tenant.name for tenant in self.tenants]
        if len(set(names)) < len(names):
            raise ConfigError(f"tenants: a name is there twice in {', '.join(names)}")

    @property
    def arrival_kind(self) -> str:
        """What was asked for, else what `users`, `burstiness` and `rate` imply."""
        if self.arrivals is not None:
            return self.arrivals
        if self.users is not None:
            return "closed"
        if self.rate is None:
            return "at-once"
        return "poisson" if self.burstiness == 1.0 else "gamma"

    def _check_replay(self) -> None:
        kept = {"num_requests", "trace", "trace_speed", "seed"}
        for name, spec in type(self).__dataclass_fields__.items():
            if name not in kept and getattr(self, name) != spec.default:
                raise ConfigError(f"{name}: has no meaning when a trace is replayed, which says it itself")

    def _check_users(self) -> None:
        if not 0 <= self.think_time < math.inf:
            raise ConfigError(f"think_time: must be at least 0 seconds, got {self.think_time!r}")
        if self.arrival_kind == "closed":
            if self.users is None or self.users < 1:
                raise ConfigError(f"users: must be at least 1 for arrivals='closed', got {self.users!r}")
        elif self.users is not None:
            raise ConfigError(f"users: only has a meaning for arrivals='closed', got {self.arrival_kind!r}")
        elif self.think_time and self.turns == "1":
            raise ConfigError("think_time: has no meaning without users or several turns")

    def _check_prefixes(self) -> None:
        if self.shared_prefix_tokens < 0:
            raise ConfigError(f"shared_prefix_tokens: must be at least 0, got {self.shared_prefix_tokens}")
        if self.num_prefix_groups < 1:
            raise ConfigError(f"num_prefix_groups: must be at least 1, got {self.num_prefix_groups}")
        if not 0 <= self.prefix_skew < math.inf:
            raise ConfigError(f"prefix_skew: must be at least 0, got {self.prefix_skew!r}")
        if self.shared_prefix_tokens == 0 and (self.num_prefix_groups, self.prefix_skew) != (1, 0.0):
            raise ConfigError("num_prefix_groups, prefix_skew: have no meaning without shared_prefix_tokens")


def make_workload(options: WorkloadOptions) -> Workload:
    """The workload that was asked for. Raises `ConfigError`."""
    from mini_vllm.simulator.replay import TraceWorkload

    if options.trace is not None:
        return TraceWorkload.from_file(options.trace, options.trace_speed, options.num_requests)
    return SyntheticWorkload(options)


# --- synthetic ------------------------------------------------------------------------------------------------


class Conversation:
    """One or several turns. history: the prompt of the last turn and its answer. offset: of its first turn among all
    the lengths that were drawn."""

    __slots__ = ("group", "history", "left", "offset", "tenant", "turn", "user")

    def __init__(self, offset: int, left: int, group: int, tenant: int, user: str) -> None:
        self.offset = offset
        self.left = left
        self.group = group
        self.tenant = tenant
        self.user = user
        self.turn = 0
        self.history: tuple[Run, ...] = ()


_NO_TENANT = TenantMix(name="")
_DEFAULT_REQUESTS = 1000


@dataclass(frozen=True)
class SyntheticWorkload:
    """Drawn from distributions."""

    options: WorkloadOptions
    prompts: tuple[Lengths, ...] = field(init=False)
    outputs: tuple[Lengths, ...] = field(init=False)
    """One per tenant."""
    turns: Lengths = field(init=False)

    def __post_init__(self) -> None:
        own = self.options
        mixes = self.mixes
        prompts = [parse_lengths("prompt_len", mix.prompt_len or own.prompt_len) for mix in mixes]
        outputs = [parse_lengths("output_len", mix.output_len or own.output_len, of_outputs=True) for mix in mixes]
        object.__setattr__(self, "prompts", tuple(prompts))
        object.__setattr__(self, "outputs", tuple(outputs))
        object.__setattr__(self, "turns", parse_lengths("turns", own.turns))

    @property
    def num_requests(self) -> int:
        return self.options.num_requests or _DEFAULT_REQUESTS

    @property
    def mixes(self) -> tuple[TenantMix, ...]:
        return self.options.tenants or (_NO_TENANT,)

    @property
    def tenants(self) -> Sequence[str]:
        return [mix.name for mix in self.mixes]

    def describe(self) -> dict[str, Any]:
        shown = {k: v for k, v in vars(self.options).items() if v is not None and k != "tenants"}
        shown |= {"arrivals": self.options.arrival_kind, "num_requests": self.num_requests}
        if self.options.tenants:
            shown["tenants"] = [vars(mix) for mix in self.options.tenants]
        return shown

    def start(self) -> "SyntheticSource":
        return SyntheticSource(self)


class SyntheticSource:
    """Hands out the requests of a `SyntheticWorkload`.

    What each request and conversation is was drawn beforehand, by its number; only who gets which number depends on
    how the simulation goes. Numbers of requests are set aside when a conversation begins (`_num_drawn`), and one for
    each that a user has yet to begin (`_num_promised`), so that all together are exactly those asked for.
    """

    def __init__(self, workload: SyntheticWorkload) -> None:
        own, count = workload.options, workload.num_requests
        seeds = np.random.SeedSequence(own.seed).spawn(7)
        arrivals, _, _, turns, groups, tenants, thinking = map(np.random.default_rng, seeds)
        self._limit = count
        self._options = own
        self._mixes = workload.mixes
        self._draw_lengths(workload, seeds[1], seeds[2])
        self._turns = workload.turns.draw(turns, count)
        self._groups = _choices(groups, np.arange(1.0, own.num_prefix_groups + 1) ** -own.prefix_skew, count)
        self._tenants = _choices(tenants, np.array([mix.share for mix in self._mixes]), count)
        self._users = tenants.random(count)
        self._thinking = thinking.exponential(own.think_time, count + (own.users or 0)) if own.think_time else None
        self._num_thoughts = self._num_drawn = self._num_begun = self._num_issued = self._num_due = 0
        self._due: list[tuple[float, int, Conversation | None]] = []
        self._starts: list[float] = []
        self._closed = own.arrival_kind == "closed"
        self._num_promised = min(own.users or 0, count)
        if self._closed:
            for _ in range(self._num_promised):
                self._later(0.0, None)
        else:
            starts = arrival_times(own.arrival_kind, self._num_conversations(), own.rate, own.burstiness, arrivals)
            self._starts = starts.tolist()

    def _draw_lengths(
        self, workload: SyntheticWorkload, prompt_seed: np.random.SeedSequence, output_seed: np.random.SeedSequence
    ) -> None:
        """Of every request, for each tenant it may turn out to be of."""
        own, count = workload.options, self._limit
        self._prompt_lens, self._output_lens = [], []
        for mix, prompts, outputs in zip(self._mixes, workload.prompts, workload.outputs, strict=True):
            asked = mix.output_len or own.output_len
            # both from one trace: the two lengths of one request belong together
            paired = asked.startswith("trace:") and asked == (mix.prompt_len or own.prompt_len)
            self._prompt_lens.append(prompts.draw(np.random.default_rng(prompt_seed), count))
            rng = np.random.default_rng(prompt_seed if paired else output_seed)
            self._output_lens.append(outputs.draw(rng, count))

    def _num_conversations(self) -> int:
        """How many it takes until their turns are `num_requests`."""
        return int(np.searchsorted(np.cumsum(self._turns), self._limit)) + 1

    # -- a source ----------------------------------------------------------------------------------------

    def next_time(self) -> float:
        start = self._next_start()
        return min(start, self._due[0][0]) if self._due else start

    def _next_start(self) -> float:
        return self._starts[self._num_begun] if self._num_begun < len(self._starts) else math.inf

    def pop(self) -> SimRequest:
        if self._due and self._due[0][0] <= self._next_start():
            time, _, conversation = heapq.heappop(self._due)
        else:
            time, conversation = self._starts[self._num_begun], None
        return self._ask(conversation or self._begin(), time)

    def finished(self, request: SimRequest, time: float) -> None:
        conversation = request.conversation
        assert conversation is not None, "only requests of this source end here"
        if conversation.left:
            self._later(time, conversation)
        elif self._closed and self._num_drawn + self._num_promised < self._limit:
            self._num_promised += 1
            self._later(time, None)

    def _later(self, time: float, conversation: Conversation | None) -> None:
        if self._thinking is not None:
            time += float(self._thinking[self._num_thoughts])
            self._num_thoughts += 1
        self._num_due += 1
        heapq.heappush(self._due, (time, self._num_due, conversation))

    # -- making requests ---------------------------------------------------------------------------------

    def _begin(self) -> Conversation:
        number, offset = self._num_begun, self._num_drawn
        if self._closed:
            self._num_promised -= 1
        left = min(int(self._turns[number]), self._limit - offset - self._num_promised)
        self._num_begun += 1
        self._num_drawn += left
        tenant = int(self._tenants[number])
        num_users = self._mixes[tenant].users
        user = f"user{int(self._users[number] * num_users)}" if num_users > 1 else ""
        return Conversation(offset, left, int(self._groups[number]), tenant, user)

    def _ask(self, conversation: Conversation, time: float) -> SimRequest:
        """The next turn. Its history is what came before, answer included."""
        index, self._num_issued = self._num_issued, self._num_issued + 1
        place, tenant = conversation.offset + conversation.turn, conversation.tenant
        if conversation.turn == 0 and self._options.shared_prefix_tokens:
            conversation.history = ((SHARED_IDS + conversation.group, self._options.shared_prefix_tokens),)
        token_id, output_len = 2 * index, int(self._output_lens[tenant][place])
        runs = (*conversation.history, (token_id, int(self._prompt_lens[tenant][place])))
        conversation.turn += 1
        conversation.left -= 1
        conversation.history = (*runs, (token_id + 1, output_len)) if conversation.left else ()
        mix = self._mixes[tenant]
        return SimRequest(
            index, time, runs, output_len, token_id + 1, mix.name, conversation.user, mix.priority, 1, conversation
        )


def _choices(rng: np.random.Generator, weights: NDArray[Any], count: int) -> NDArray[np.int64]:
    return rng.choice(len(weights), count, p=weights / weights.sum())
