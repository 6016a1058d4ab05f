"""Sorting picked values: the way through numpy and the way through torch give the same."""

import pytest
import torch

from mini_vllm.ops import selection


def case(seed: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, 300, generator=generator).round(decimals=1)  # with ties
    values[0, :7] = -torch.inf
    mask = torch.rand(5, 300, generator=generator) < share
    return values, mask


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_both_ways_give_the_same_values_in_the_same_order(share: float) -> None:
    values, mask = case(int(100 * share), share)
    host, torch_way = selection._sort_on_host(values, mask), selection._sort_in_torch(values, mask)
    width = host.shape[1]
    assert torch.equal(host, torch_way[:, :width])
    assert bool((torch_way[:, width:] == -torch.inf).all())


def test_the_comparison_notices_a_value_that_was_not_picked() -> None:
    values, mask = case(1, 0.5)
    wrong = mask.clone()
    wrong[2, int(mask[2].nonzero()[0])] = False
    host = selection._sort_on_host(values, wrong)
    assert not torch.equal(host, selection._sort_in_torch(values, mask)[:, : host.shape[1]])
