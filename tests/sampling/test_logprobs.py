"""Log-probabilities are those of the raw logits, with ranks."""

import math

import numpy as np
import pytest
import torch

from mini_vllm.sampling import logprobs
from mini_vllm.sampling.logprobs import token_logprobs


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_values_ranks_and_order(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ELEMENTS", chunk)
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    exact = torch.log_softmax(logits.double(), dim=1).numpy()
    tokens = torch.tensor([3, 0, 39, 7, 7, 1])
    tops, extra = [0, 1, 5, -1, 2, 40], [(), (4, 3), (), (0,), (), ()]
    found = token_logprobs(logits, tokens, tops, extra)
    for row, entry in enumerate(found):
        order = np.argsort(-exact[row])[: tops[row] if tops[row] >= 0 else 40].tolist()
        assert entry.token_ids == [int(tokens[row]), *order, *extra[row]]
        np.testing.assert_allclose(entry.logprobs, exact[row][entry.token_ids], atol=1e-5)
        assert entry.rank == 1 + int((exact[row] > exact[row][int(tokens[row])]).sum())


def test_tied_tokens_share_the_worse_rank_and_impossible_ones_are_minus_infinity() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, -math.inf]])
    assert token_logprobs(logits, torch.tensor([0]), [0])[0].rank == 3
    entry = token_logprobs(logits, torch.tensor([3]), [-1])[0]
    assert entry.rank == 4 and entry.logprobs[0] == -math.inf and entry.token_ids[1] == 1
