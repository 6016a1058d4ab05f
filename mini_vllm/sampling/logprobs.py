"""Log-probabilities of the model's own distribution, for the rows that ask.

Raw: of the logits as the model gave them, before masks, processors, penalties and temperature (vLLM's default
`logprobs_mode`). Ranks count the tokens at least as likely as the one asked about, itself included.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from mini_vllm.core.scheduler_output import TokenLogprobs
from mini_vllm.sampling.inversion import probabilities
from mini_vllm.sampling.sampler import find_best
from mini_vllm.sampling.truncation import best_tokens

_CHUNK_ELEMENTS = 1 << 19
"""Logits worked on at once."""


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    num_top: Sequence[int],
    extra_ids: Sequence[Sequence[int]] | None = None,
    rows: npt.NDArray[np.int64] | None = None,
) -> list[TokenLogprobs]:
    """One entry a row of `logits` `[R, V]` float32: that of `token_ids` `[R]`, then of the likeliest ones, then of
    `extra_ids[row]`.

    num_top: how many of the likeliest; -1 is the whole vocabulary. rows: `[R]` the rows of `logits` meant; None is all.
    """
    vocab = logits.shape[1]
    tops = [vocab if count < 0 else min(count, vocab) for count in num_top]
    size = max(1, _CHUNK_ELEMENTS // vocab)
    found: list[TokenLogprobs] = []
    is_all = rows is None or np.array_equal(rows, np.arange(len(logits)))
    for start in range(0, len(tops), size):
        here = slice(start, start + size)
        chunk = logits[here] if rows is None or is_all else logits[torch.from_numpy(rows[here]).to(logits.device)]
        extra = None if extra_ids is None else extra_ids[here]
        found += _of_chunk(chunk, token_ids[here], tops[here], extra)
    return found


def _of_chunk(
    logits: torch.Tensor, token_ids: torch.Tensor, tops: list[int], extra_ids: Sequence[Sequence[int]] | None
) -> list[TokenLogprobs]:
    rows = find_best(logits)
    likelihood = probabilities(logits, rows.best, torch.ones_like(rows.best)).gather(1, rows.best_ids.unsqueeze(1))
    norm = rows.best - likelihood.log()
    own = logits.gather(1, token_ids.unsqueeze(1))
    ranks = (logits >= own).sum(dim=1).tolist()
    everyone = torch.arange(len(logits), device=logits.device)
    values, ids = best_tokens(logits, rows.block_max, everyone, max(tops)) if max(tops) else (own[:, :0], own[:, :0])
    own_values, top_values = (own - norm).squeeze(1).tolist(), (values - norm).tolist()
    columns = zip(token_ids.tolist(), own_values, ids.tolist(), top_values, ranks, tops, strict=True)
    found = [
        TokenLogprobs([token_id, *row_ids[:top]], [own_value, *row_values[:top]], rank)
        for token_id, own_value, row_ids, row_values, rank, top in columns
    ]
    if extra_ids is not None:
        for row, (entry, wanted) in enumerate(zip(found, extra_ids, strict=True)):
            if wanted:
                entry.token_ids += wanted
                entry.logprobs += (logits[row, list(wanted)] - norm[row]).tolist()
    return found
