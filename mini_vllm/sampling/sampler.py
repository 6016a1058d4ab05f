"""One token for every row of a batch, without a Python loop over rows.

Greedy rows take the argmax. The others get one uniform number each (`sampling.philox`, a function of the request's
seed and of how many tokens it has) and invert the cumulative distribution in order of token id. Every operation is
row by row, so a row's token does not depend on its neighbours.

Only rows that ask for top-k or top-p are ranked, and not by a full sort: the best candidates suffice nearly always,
and what is needed of the ranking is only where it is cut.
"""

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.sampling import philox
from mini_vllm.sampling.metadata import SamplingMetadata

NO_TOKEN = -1
"""Returned for a row whose logits allow no token: all -inf, or NaN or +inf among them."""

_CHUNK_ELEMENTS = 1 << 19
"""Logits worked on at once, which bounds the memory it takes and keeps it in cache."""
_BLOCK = 128
"""Tokens that are reduced at once when a row is worked on in two levels."""
_FEW_LOGITS = 1 << 14
"""Up to here finding the argmax directly takes less than the calls of two levels."""
_BELOW_ONE = 1.0 - 2.0**-52
"""Any float64 times this is smaller than it, after rounding too."""
_LOWEST_SCORE = -80.0
_NEGLIGIBLE = 1e-34
"""Weights up to this (which is above exp of the lowest score) vanish in a float64 sum beside a weight of 1."""
_CANDIDATES = 256
"""How many of the best tokens top-p looks at before it looks at all."""


class Sampler:
    """Callable without state: the same logits and metadata give the same tokens."""

    def __call__(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Token ids `[R]` int64 (or `NO_TOKEN`) from logits `[R, V]` float32, which are left as they are."""
        best_ids, best = _argmax(logits)
        ids = best_ids if metadata.all_greedy else _draw(logits, best, best_ids, metadata)
        return ids.masked_fill((best - best).squeeze(1) != 0, NO_TOKEN)  # 0 only if finite; a row with NaN has NaN here


def _argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(id of the first of the highest logits `[R]`, that logit `[R, 1]`); NaN counts as the highest.

    In two levels, because finding a maximum is many times faster than finding where it is.
    """
    vocab = logits.shape[1]
    whole = vocab - vocab % _BLOCK
    if whole <= _BLOCK or logits.numel() <= _FEW_LOGITS:
        ids = logits.argmax(dim=1)
        return ids, logits.gather(1, ids.unsqueeze(1))
    highest = logits[:, :whole].unflatten(1, (-1, _BLOCK)).amax(dim=2)
    if whole < vocab:
        highest = torch.cat((highest, logits[:, whole:].amax(dim=1, keepdim=True)), dim=1)
    # The last block may be short; a window that reaches back into the one before finds nothing as high there.
    start = (highest.argmax(dim=1, keepdim=True) * _BLOCK).clamp_(max=vocab - _BLOCK)
    window = logits.gather(1, start + torch.arange(_BLOCK, device=logits.device))
    inside = window.argmax(dim=1, keepdim=True)
    return (start + inside).squeeze(1), window.gather(1, inside)


def _draw(logits: torch.Tensor, best: torch.Tensor, best_ids: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """Replace `best_ids` in the rows that are not greedy."""
    rows = np.flatnonzero(metadata.temperature)
    uniforms = philox.uniform(metadata.seed[rows], metadata.draw_index[rows])
    ids = best_ids.clone()
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        weights = _weights(logits, best, part, metadata)
        drawn = _invert(weights, _to(uniforms[start : start + chunk], logits.device))
        if len(part) == ids.shape[0]:
            return drawn
        ids[_to(part, logits.device)] = drawn
    return ids


def _weights(
    logits: torch.Tensor, best: torch.Tensor, rows: npt.NDArray[np.int64], metadata: SamplingMetadata
) -> torch.Tensor:
    """Unnormalised probabilities `[len(rows), V]`, the largest 1, zero where top-k or top-p cut.

    float32, padded with zeros to `[len(rows), blocks * _BLOCK]`.
    """
    device, vocab = logits.device, logits.shape[1]
    if len(rows) < logits.shape[0]:
        index = _to(rows, device)
        logits, best = logits[index], best[index]
    temperature = _to(metadata.temperature[rows], device).unsqueeze(1)
    padded = logits.new_empty(len(rows), -(-vocab // _BLOCK) * _BLOCK)
    padded[:, vocab:] = 0.0
    weights = padded[:, :vocab]
    _exp_(torch.sub(logits, best, out=weights).div_(temperature))
    top_k, top_p = metadata.top_k[rows], metadata.top_p[rows]
    top_k = np.where((top_k <= 0) | (top_k > vocab), vocab, top_k)
    cut = np.flatnonzero((top_k < vocab) | (top_p < 1.0))
    if len(cut) == len(rows):
        _apply_top_k_top_p(weights, logits, temperature, top_k, top_p)
    elif len(cut):
        index = _to(cut, device)
        part = weights[index]
        _apply_top_k_top_p(part, logits[index], temperature[index], top_k[cut], top_p[cut])
        weights[index] = part
    return padded


def _exp_(scores: torch.Tensor) -> torch.Tensor:
    """In place. What is too small to matter becomes 0: exp takes up to 60 times as long where it gets denormal."""
    return torch.threshold_(scores.clamp_(min=_LOWEST_SCORE).exp_(), _NEGLIGIBLE, 0.0)


def _apply_top_k_top_p(
    weights: torch.Tensor,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: npt.NDArray[np.int64],
    top_p: npt.NDArray[np.float64],
) -> None:
    """Zero the weights `[F, V]` of all tokens but those that top-k, then top-p leave. Ties go to the lowest ids.

    Logits are ranked, not weights: those of two unequal logits can round to the same number.
    """
    vocab, device = logits.shape[1], logits.device
    candidates = int(np.where(top_k < vocab, top_k, _CANDIDATES).max()) + 1
    ks, ps = _to(top_k, device).unsqueeze(1), _to(top_p, device).unsqueeze(1)
    total = weights.sum(dim=1, keepdim=True).double()
    count, threshold, tied = _cut(logits, temperature, ks, ps, total, min(candidates, vocab))
    weights.masked_fill_(logits < threshold, 0.0)
    if bool(tied.any()):
        at_cut = (logits == threshold) & tied
        room = count - (logits > threshold).sum(dim=1, keepdim=True)
        weights.masked_fill_(at_cut & (at_cut.cumsum(dim=1) > room), 0.0)


def _cut(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    total: torch.Tensor,
    candidates: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many tokens stay, the logit of the last of them, and whether the next has the same: `[F, 1]` each.

    total: the weight of the whole vocabulary `[F, 1]` float64, by which top-p is measured where top-k is off.
    Only the best `candidates` are ranked; rows whose answer lies beyond are looked at again with more.
    """
    vocab = logits.shape[1]
    ranked = logits.topk(candidates, dim=1).values
    within_k = torch.arange(candidates, device=logits.device) < top_k
    mass = _exp_((ranked - ranked[:, :1]).div_(temperature)).mul_(within_k).double().cumsum(dim=1)
    goal = top_p * torch.where(top_k < vocab, mass[:, -1:], total)
    count = (mass < goal).sum(dim=1, keepdim=True) + 1
    count = torch.where(top_p < 1.0, count, vocab).minimum(top_k)
    threshold = ranked.gather(1, count.clamp(max=candidates) - 1)
    tied = (ranked.gather(1, count.clamp(max=candidates - 1)) == threshold) & (count < candidates)
    beyond = (count >= candidates).squeeze(1)
    if candidates < vocab and bool(beyond.any()):
        rest = (logits[beyond], temperature[beyond], top_k[beyond], top_p[beyond], total[beyond])
        count[beyond], threshold[beyond], tied[beyond] = _cut(*rest, min(16 * candidates, vocab))
    return count, threshold, tied


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative weight exceeds its row's uniform share of the total, `[rows]` int64.

    In two levels, blocks and then one block's tokens, because a running sum over a whole vocabulary is slow.
    Running sums are float64: in float32 the tail of a large vocabulary would vanish.
    """
    blocks = weights.unflatten(1, (-1, _BLOCK))
    ends = torch.zeros(blocks.shape[0], blocks.shape[1] + 1, dtype=torch.float64, device=weights.device)
    torch.cumsum(blocks.sum(dim=2).double(), dim=1, out=ends[:, 1:])
    target = (uniforms * ends[:, -1]).unsqueeze(1)
    block = _first_above(ends[:, 1:], target)
    chosen = blocks[torch.arange(blocks.shape[0], device=weights.device), block.squeeze(1)]
    inside = _first_above(chosen.double().cumsum(dim=1), target - ends.gather(1, block))
    return (block * _BLOCK + inside).squeeze(1)


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[rows, 1]`: the first index whose value exceeds the target, never one that added nothing.

    Rounding may leave the target at or above the total; then it is where the total was reached.
    """
    return (cumulative <= torch.minimum(target, cumulative[:, -1:] * _BELOW_ONE)).sum(dim=1, keepdim=True)


def _to(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
