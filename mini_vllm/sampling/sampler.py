"""One token for every draw of a batch, without a Python loop over rows.

The order is vLLM's, and is explained in `docs/sampling.md`: masks, biases, processors and penalties change the
logits; greedy draws take the argmax and are done; the others are divided by their temperature, truncated
(`sampling.truncation`), and get one uniform number each, with which the cumulative distribution is inverted in order of
token id (`sampling.inversion`). Every operation is row by row, so a token does not depend on the neighbours.

Where there is a native kernel it draws (`ops.sampling`), after a pass for the highest of each row. In torch nothing
passes over a vocabulary for rows that do not need it: greedy rows are reduced once, those that keep few tokens are
looked at in the blocks where these are.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.ops.argmax import argmax, finite_argmax, has_native_argmax
from mini_vllm.ops.sampling import draw_tokens, has_native_draws
from mini_vllm.sampling import inversion, truncation
from mini_vllm.sampling.metadata import SamplingMetadata
from mini_vllm.sampling.truncation import Limits

Int64 = npt.NDArray[np.int64]

NO_TOKEN = -1
"""Returned for a draw whose logits allow no token: all -inf, or NaN or +inf among them."""

_CHUNK_ELEMENTS = 1 << 19
"""Logits worked on at once, which bounds the memory it takes and keeps it in cache."""
_BLOCK = truncation.BLOCK
_FEW_LOGITS = 1 << 14
"""Up to here finding the argmax directly takes less than the calls of two levels."""


@dataclass(slots=True)
class Rows:
    """Logits and what is known of them. logits `[R, V]`, best `[R, 1]` and best_ids `[R]`: the highest of each row.

    block_max: `[R, V // _BLOCK]` the highest of each whole block; None where it was not needed to find the best.
    """

    logits: torch.Tensor
    best: torch.Tensor
    best_ids: torch.Tensor
    block_max: torch.Tensor | None

    def part(self, numbers: Int64) -> "Rows":
        """Some of them, for the moment: the logits are valid until the next call."""
        first, last = int(numbers[0]), int(numbers[-1])
        if last - first + 1 == len(numbers) and bool((np.diff(numbers) == 1).all()):
            return self._pick(slice(first, last + 1), self.logits[first : last + 1])
        index = _to(numbers, self.logits.device)
        out = inversion.scratch("rows", (len(numbers), self.logits.shape[1]), self.logits.device)
        return self._pick(index, torch.index_select(self.logits, 0, index, out=out))

    def _pick(self, index: torch.Tensor | slice, logits: torch.Tensor) -> "Rows":
        block_max = None if self.block_max is None else self.block_max[index]
        return Rows(logits, self.best[index], self.best_ids[index], block_max)


class Sampler:
    """Callable without state: the same logits and metadata give the same tokens."""

    def __call__(self, logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Token ids `[D]` int64 (or `NO_TOKEN`), one a draw, from logits `[R, V]` float32.

        Without `metadata.edit` the logits are left as they are.
        """
        if metadata.edit is not None:
            logits = metadata.edit(logits)
        if metadata.all_greedy and metadata.logits_row is None and has_native_argmax(logits):
            return finite_argmax(logits)  # NO_TOKEN is -1 as well
        rows = find_best(logits, for_draws=not metadata.all_greedy and not has_native_draws(logits))
        ids, best = rows.best_ids, rows.best
        if metadata.logits_row is not None:
            source = _to(metadata.logits_row, logits.device)
            ids, best = ids[source], best[source]
        if not metadata.all_greedy:
            ids = _draw_all(rows, ids, metadata)
        return torch.where(best.squeeze(1).isfinite(), ids, NO_TOKEN)  # a row with NaN has NaN here


def find_best(logits: torch.Tensor, *, for_draws: bool = True) -> Rows:
    """The first of the highest logits of each row; NaN counts as the highest.

    In two levels, because finding a maximum is many times faster than finding where it is; unless a kernel finds both
    at once and nobody is going to draw, who would want the highest of each block.
    """
    if not for_draws and has_native_argmax(logits):
        best, best_ids = argmax(logits)
        return Rows(logits, best, best_ids, None)
    vocab = logits.shape[1]
    whole = vocab - vocab % _BLOCK
    if whole <= _BLOCK or logits.numel() <= _FEW_LOGITS:
        ids = logits.argmax(dim=1)
        return Rows(logits, logits.gather(1, ids.unsqueeze(1)), ids, None)
    block_max = highest = logits[:, :whole].unflatten(1, (-1, _BLOCK)).amax(dim=2)
    if whole < vocab:
        highest = torch.cat((highest, logits[:, whole:].amax(dim=1, keepdim=True)), dim=1)
    # The last block may be short; a window that reaches back into the one before finds nothing as high there.
    start = (highest.argmax(dim=1, keepdim=True) * _BLOCK).clamp_(max=vocab - _BLOCK)
    window = logits.gather(1, start + torch.arange(_BLOCK, device=logits.device))
    inside = window.argmax(dim=1, keepdim=True)
    return Rows(logits, window.gather(1, inside), (start + inside).squeeze(1), block_max)


def _draw_all(rows: Rows, ids: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """`ids` `[D]` with those of the draws that are not greedy replaced."""
    numbers = np.flatnonzero(metadata.temperature)
    device, vocab = rows.logits.device, rows.logits.shape[1]
    uniforms = _to(metadata.uniforms(numbers), device)
    if metadata.rescale is not None:
        rows, metadata = _rescaled(rows, metadata)
    source = numbers if metadata.logits_row is None else metadata.logits_row[numbers]
    limits, is_cut = _limits(metadata, numbers, vocab, device)
    if has_native_draws(rows.logits):
        columns = (limits.temperature, limits.top_k, limits.top_p, limits.min_p)
        drawn = draw_tokens(rows.logits, _to(source, device), rows.best, columns, uniforms)
    else:
        drawn = _draw_in_torch(rows, source, limits, is_cut, uniforms)
    if metadata.rescale is not None:
        drawn = drawn.masked_fill((rows.best - rows.best)[_to(source, device)].squeeze(1) != 0, NO_TOKEN)
    if len(numbers) == len(ids):
        return drawn
    ids = ids.clone()
    ids[_to(numbers, device)] = drawn
    return ids


def _draw_in_torch(
    rows: Rows, source: Int64, limits: Limits, is_cut: npt.NDArray[np.bool_], uniforms: torch.Tensor
) -> torch.Tensor:
    """Draws `[F]` from the row numbers `source`, without a native kernel. is_cut `[F]`: which are truncated at all."""
    drawn = torch.empty(len(source), dtype=torch.int64, device=rows.logits.device)
    for cut, draw in ((False, _draw_plainly), (True, _draw_truncated)):
        which = np.flatnonzero(is_cut == cut)
        if len(which):
            index = _to(which, drawn.device)
            drawn[index] = draw(rows, source[which], limits.rows(index), uniforms[index])
    return drawn


def _limits(
    metadata: SamplingMetadata, numbers: Int64, vocab: int, device: torch.device
) -> tuple[Limits, npt.NDArray[np.bool_]]:
    """(limits of these draws, which of them truncate at all)."""
    top_k, top_p, min_p = metadata.top_k[numbers], metadata.top_p[numbers], metadata.min_p[numbers]
    top_k = np.where((top_k <= 0) | (top_k > vocab), vocab, top_k)
    columns = (metadata.temperature[numbers], top_k, top_p, min_p)
    limits = Limits(*(_to(column, device).unsqueeze(1) for column in columns))
    return limits, (top_k < vocab) | (top_p < 1.0) | (min_p > 0.0)


def _rescaled(rows: Rows, metadata: SamplingMetadata) -> tuple[Rows, SamplingMetadata]:
    """The rows after temperature and what comes after it; dividing by the temperature is done then."""
    assert metadata.rescale is not None
    divisor = np.ones(len(rows.logits), dtype=np.float32)
    source = slice(None) if metadata.logits_row is None else metadata.logits_row
    divisor[source] = np.where(metadata.temperature > 0, metadata.temperature, 1.0)  # draws of a row have the same
    scaled = (rows.logits - rows.best) / _to(divisor, rows.logits.device).unsqueeze(1)
    temperature = (metadata.temperature > 0).astype(np.float32)
    scaled = metadata.rescale(scaled)
    return find_best(scaled, for_draws=not has_native_draws(scaled)), dataclasses.replace(
        metadata, temperature=temperature
    )


def _draw_plainly(rows: Rows, source: Int64, limits: Limits, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws `[F]` from whole rows, the row numbers `source`."""
    drawn = []
    size = max(1, _CHUNK_ELEMENTS // rows.logits.shape[1])
    for start in range(0, len(source), size):
        here = slice(start, start + size)
        part = rows.part(source[here])
        weights = inversion.probabilities(part.logits, part.best, limits.temperature[here])
        drawn.append(inversion.invert(weights, uniforms[here]))
    return torch.cat(drawn)


def _draw_truncated(rows: Rows, source: Int64, limits: Limits, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws `[F]` from what the limits leave of the row numbers `source`: from a few candidates where these are enough,
    from all tokens otherwise."""
    vocab, device = rows.logits.shape[1], rows.logits.device
    counts = truncation.num_candidates(limits.top_k.squeeze(1).cpu().numpy(), vocab)
    count, looked_at = int(counts.max()), _to(counts, device).unsqueeze(1)
    total = _totals(rows, source, limits)
    drawn = torch.empty(len(source), dtype=torch.int64, device=device)
    is_open = torch.empty(len(source), dtype=torch.bool, device=device)
    size = max(1, _CHUNK_ELEMENTS // (count * _BLOCK))
    for start in range(0, len(source), size):
        here = slice(start, start + size)
        values, ids = truncation.best_tokens(rows.logits, rows.block_max, _to(source[here], device), count)
        cut = truncation.find_cut(values, values[:, :1], limits.rows(here), vocab, total[here], None, looked_at[here])
        drawn[here] = truncation.draw_from(values, ids, cut, uniforms[here])
        is_open[here] = cut.is_open.squeeze(1)
    if bool(is_open.any()):
        index = is_open.nonzero().squeeze(1)
        drawn[index] = _draw_wide(rows, source[index.cpu().numpy()], limits.rows(index), uniforms[index])
    return drawn


def _totals(rows: Rows, source: Int64, limits: Limits) -> torch.Tensor:
    """`[F, 1]` float64: the weight of the whole vocabulary (the highest is 1) for draws that only top-p limits."""
    vocab = rows.logits.shape[1]
    total = torch.ones_like(limits.top_p)
    needed = ((limits.top_k >= vocab) & (limits.min_p == 0)).squeeze(1)
    for index in _chunks(needed, max(1, _CHUNK_ELEMENTS // vocab)):
        part = rows.part(source[index.cpu().numpy()])
        weights = inversion.probabilities(part.logits, part.best, limits.temperature[index])
        total[index] = 1.0 / weights.gather(1, part.best_ids.unsqueeze(1)).double()
    return total


def _draw_wide(rows: Rows, source: Int64, limits: Limits, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws from rows that keep more tokens than are looked at first."""
    vocab, device = rows.logits.shape[1], rows.logits.device
    drawn = torch.empty(len(source), dtype=torch.int64, device=device)
    by_min_p = ((limits.top_k >= vocab) & (limits.top_p >= 1.0)).squeeze(1)
    size = max(1, _CHUNK_ELEMENTS // vocab)
    for index in _chunks(by_min_p, size):
        part = rows.part(source[index.cpu().numpy()])
        drawn[index] = truncation.draw_by_min_p(part.logits, part.best, limits.rows(index), uniforms[index])
    for index in _chunks(~by_min_p, size):
        part = rows.part(source[index.cpu().numpy()])
        drawn[index] = truncation.draw_by_sorting(
            part.logits, part.best, limits.rows(index), part.block_max, uniforms[index]
        )
    return drawn


def _chunks(chosen: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """The numbers where `chosen` `[F]` is set, some at a time."""
    numbers = chosen.nonzero().squeeze(1)
    return numbers.split(size) if len(numbers) else ()


def _to(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
