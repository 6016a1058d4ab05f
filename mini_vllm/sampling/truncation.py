"""Which tokens top-k, top-p and min-p leave of a row, and a draw from those.

The order is min-p, top-k, top-p, as in vLLM: each is measured on what those before it left. Ties at the cut go to
the lowest ids, except that min-p keeps all that are equally probable.

A full sort over a large vocabulary costs a hundred times what is needed. Nearly always the tokens that stay are among
the best few, and these are found in blocks of the vocabulary whose highest logits are known already: the
best C tokens lie in the C blocks with the highest maxima. Rows that keep more (or have ties beyond) are sorted.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.ops.selection import sort_descending
from mini_vllm.sampling.inversion import first_above, invert, probabilities, scratch

BLOCK = 128
"""Tokens that are reduced at once when a row is worked on in two levels."""
CANDIDATES = 96
"""How many of the best tokens are looked at for a row that top-k does not limit."""
_SPARE = 14
"""Candidates beyond top-k's, for ties: logits that come of bfloat16 tie often."""
_MOST_CANDIDATES = 256
"""Rows of which top-k keeps more are looked at as a whole."""
_BISECTIONS = 7
"""Halvings of the range in which a wide nucleus ends, before the rest is sorted."""
_NEGLIGIBLE = 1e-34
"""Weights below this vanish in a sum beside the highest, which is 1."""


@dataclass
class Limits:
    """What is asked of some rows, `[F, 1]` each: top_k int64 (the vocabulary's size is off), top_p and min_p float64,
    temperature float32."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def rows(self, index: torch.Tensor | slice) -> "Limits":
        return Limits(self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index])


@dataclass
class Cut:
    """Where rows are cut, `[F, 1]` each: how many tokens stay, the logit of the last of them, and whether more tokens
    may stay than were looked at. weights: `[F, C]` float64 of those looked at, the highest is 1."""

    count: torch.Tensor
    threshold: torch.Tensor
    is_open: torch.Tensor
    weights: torch.Tensor


def num_candidates(top_k: npt.NDArray[np.int64], vocab: int) -> npt.NDArray[np.int64]:
    """How many of the best tokens to look at for each row. A matter of the row alone: another way to the same
    distribution rounds otherwise, and a token must not depend on the neighbours."""
    wanted = top_k + _SPARE
    return np.minimum(np.where((top_k < vocab) & (wanted <= _MOST_CANDIDATES), wanted, CANDIDATES), vocab)


def best_tokens(
    logits: torch.Tensor, block_max: torch.Tensor | None, rows: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, ids) `[F, count]` of the highest logits of each of `rows` `[F]`, highest first; fewer for a small
    vocabulary.

    logits: `[R, V]`. block_max: `[R, B]` the highest of each whole block of `BLOCK`; None if they are not known.
    """
    vocab = logits.shape[1]
    if block_max is None or 2 * count > block_max.shape[1]:
        values, ids = logits[rows].topk(min(count, vocab), dim=1)
        return values, ids
    blocks = block_max[rows].topk(count, dim=1, sorted=False).indices
    whole = block_max.shape[1] * BLOCK
    inside = logits[:, :whole].unflatten(1, (-1, BLOCK))
    windows = inside[rows.unsqueeze(1), blocks].flatten(1)
    if whole < vocab:
        windows = torch.cat((windows, logits[rows, whole:]), dim=1)
    values, at = windows.topk(count, dim=1)
    ids = blocks.gather(1, (at // BLOCK).clamp_(max=count - 1)) * BLOCK + at % BLOCK
    return values, torch.where(at < count * BLOCK, ids, at - count * BLOCK + whole)


def find_cut(
    ranked: torch.Tensor,
    best: torch.Tensor,
    limits: Limits,
    vocab: int,
    total: torch.Tensor,
    above: torch.Tensor | None = None,
    looked_at: torch.Tensor | None = None,
) -> Cut:
    """Where to cut rows of which logits `[F, C]` in descending order are given: the highest ones, of `best` `[F, 1]`.

    total: `[F, 1]` float64 the weight of the whole vocabulary, read for rows with neither top-k nor min-p.
    looked_at: `[F, 1]` how many of those given count; None is all.
    above: `[F, 1]` float64, the weight of tokens that are higher than those given and stay in any case. With it,
        tokens lower than those given cannot stay; `count` is of those given.
    """
    if looked_at is None:
        looked_at = torch.full_like(limits.top_k, ranked.shape[1])
    position = torch.arange(ranked.shape[1], device=ranked.device)
    weights = ((ranked - best) / limits.temperature).double().exp()
    least = limits.min_p.clamp(min=_NEGLIGIBLE)
    stays = (weights >= least) & (position < torch.minimum(limits.top_k, looked_at))
    mass = (weights * stays).cumsum(dim=1)
    if above is not None:
        mass += above
    is_unlimited = (limits.top_k >= vocab) & (limits.min_p == 0)
    goal = limits.top_p * torch.where(is_unlimited, total, mass[:, -1:])
    num_stay = stays.sum(dim=1, keepdim=True)
    nucleus = (mass < goal).sum(dim=1, keepdim=True) + 1
    count = torch.where(limits.top_p < 1, torch.minimum(nucleus, num_stay), num_stay).clamp(min=1)
    threshold = ranked.gather(1, count - 1)
    is_open = torch.zeros_like(stays[:, :1])
    if above is None:
        last_is_probable = weights.gather(1, looked_at - 1) >= least
        reaches_on = torch.where(is_unlimited, nucleus >= looked_at, last_is_probable & (limits.top_k >= looked_at))
        ties_go_on = last_is_probable & (ranked.gather(1, looked_at - 1) >= threshold)
        is_open = (reaches_on | ties_go_on) & (looked_at < vocab)
    return Cut(count, threshold, is_open, weights)


def draw_from(values: torch.Tensor, ids: torch.Tensor, cut: Cut, uniforms: torch.Tensor) -> torch.Tensor:
    """Token ids `[F]` drawn from candidates `[F, C]` that hold all that stay, in order of token id."""
    ids, order = ids.sort(dim=1)
    values = values.gather(1, order)
    tied = values == cut.threshold
    room = cut.count - (values > cut.threshold).sum(dim=1, keepdim=True)
    stays = (values > cut.threshold) | (tied & (tied.cumsum(dim=1) <= room))
    cumulative = (cut.weights.gather(1, order) * stays).cumsum(dim=1)
    at = first_above(cumulative, (uniforms * cumulative[:, -1]).unsqueeze(1))
    return ids.gather(1, at.clamp_(max=ids.shape[1] - 1)).squeeze(1)


def draw_by_min_p(logits: torch.Tensor, best: torch.Tensor, limits: Limits, uniforms: torch.Tensor) -> torch.Tensor:
    """Token ids `[F]` of rows that only min-p limits, where nothing has to be ranked."""
    weights = probabilities(logits, best, limits.temperature)
    weights *= weights >= (limits.min_p * weights.amax(dim=1, keepdim=True)).float()
    return invert(weights, uniforms)


def draw_by_sorting(
    logits: torch.Tensor,
    best: torch.Tensor,
    limits: Limits,
    block_max: torch.Tensor | None,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """Token ids `[F]` of rows that keep many tokens: the whole row is looked at, but only those that may stand at the
    cut are sorted. best: `[F, 1]`, the highest logit."""
    vocab = logits.shape[1]
    weights = probabilities(logits, best, limits.temperature)
    kept = weights[:, :vocab]
    total = 1.0 / weights.amax(dim=1, keepdim=True).double()
    above = torch.zeros_like(total)
    near = logits >= _floor(best, limits, block_max, vocab)
    is_unlimited = (limits.top_k >= vocab) & (limits.min_p == 0)
    if bool(is_unlimited.any()):
        bracket, mass = _around_nucleus(kept, limits.top_p)
        above = torch.where(is_unlimited, mass * total, above)
        near = bracket if bool(is_unlimited.all()) else torch.where(is_unlimited, bracket, near)
    ranked = sort_descending(logits, near)
    cut = find_cut(ranked, best, limits, vocab, total, above)
    kept *= logits >= cut.threshold
    following = ranked.gather(1, cut.count.clamp(max=ranked.shape[1] - 1))
    if bool(((following == cut.threshold) & (cut.count < ranked.shape[1])).any()):
        tied = logits == cut.threshold
        room = cut.count - (ranked > cut.threshold).sum(dim=1, keepdim=True)
        kept *= ~tied | (tied.cumsum(dim=1) <= room)
    return invert(weights, uniforms)


def _around_nucleus(weights: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the tokens `[F, V]` among which the last of the nucleus is, the probability of all that are higher `[F, 1]`).

    weights: probabilities `[F, V]`. Bisects for the probability at the cut, in proportions: a step takes one pass of
    sums and halves what is to be sorted. Tokens of less than (1 - p) / V have less than 1 - p together, which is
    where it begins.
    """
    goal = top_p * weights.sum(dim=1, keepdim=True).double()
    low = ((1.0 - top_p) / weights.shape[1] * 0.999).clamp_(min=1e-37).float()  # the margin is for rounding
    high = weights.amax(dim=1, keepdim=True)
    above = torch.zeros_like(goal)
    scaled = scratch("scaled", (weights.shape[0], weights.shape[1]), weights.device)
    for _ in range(_BISECTIONS):
        middle = (low * high).sqrt()
        torch.div(weights, middle, out=scaled)
        mass = torch.threshold_(scaled, 1.0, 0.0).sum(dim=1, keepdim=True).double() * middle
        is_enough = mass >= goal
        low, high = torch.where(is_enough, middle, low), torch.where(is_enough, high, middle)
        above = torch.where(is_enough, above, mass)
    # The same comparisons as in the sums, or a token might be on both sides, or on none.
    is_higher = torch.div(weights, low, out=scaled) > 1.0
    return is_higher & (torch.div(weights, high, out=scaled) <= 1.0), above


def _floor(best: torch.Tensor, limits: Limits, block_max: torch.Tensor | None, vocab: int) -> torch.Tensor:
    """`[F, 1]`: logits below this cannot stay, by min-p, and by top-k: k blocks have maxima at least as high as the
    k-th highest."""
    least = limits.min_p.clamp(min=_NEGLIGIBLE) * 0.999  # the margin is for rounding
    floor = best + (least.log() * limits.temperature).float()
    if block_max is not None:
        ranked = block_max.sort(dim=1, descending=True).values
        by_top_k = ranked.gather(1, limits.top_k.clamp(max=ranked.shape[1]) - 1)
        floor = torch.where(limits.top_k <= ranked.shape[1], torch.maximum(floor, by_top_k), floor)
    return floor
