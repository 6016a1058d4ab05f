"""From weights and one uniform number to a token: the inverse of the cumulative distribution, in order of token id.

Rows are worked on in two levels, blocks and then one block's tokens, because a running sum over a whole vocabulary
is slow. Running sums are float64: in float32 the tail of a large vocabulary would vanish.
"""

import threading

import torch

BLOCK = 128
"""Tokens that are summed at once."""
_BELOW_ONE = 1.0 - 2.0**-52
"""Any float64 times this is smaller than it, after rounding too."""


def probabilities(logits: torch.Tensor, best: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """softmax(logits `[F, V]` / temperature `[F, 1]`), padded with zeros to a multiple of `BLOCK` tokens. Valid until
    the next call in this thread.

    best: `[F, 1]` the highest logit, which goes to 0 first: divided by a small temperature it could overflow.
    """
    vocab = logits.shape[1]
    shape = (logits.shape[0], -(-vocab // BLOCK) * BLOCK)
    padded = scratch("scores", shape, logits.device)
    padded[:, vocab:] = -torch.inf
    torch.sub(logits, best, out=padded[:, :vocab]).div_(temperature)
    weights: torch.Tensor = torch.softmax(padded, 1, out=scratch("weights", shape, logits.device))
    return weights


def scratch(name: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Uninitialised float32 memory that is kept from call to call, by name.

    Memory of some MiB that is asked for afresh comes from the kernel page by page, which takes several times as long as
    what is done with it here.
    """
    have = _SCRATCH.buffers.get(name)
    if have is None or have.shape[0] < shape[0] or have.shape[1] != shape[1] or have.device != device:
        with torch.inference_mode(False):
            have = _SCRATCH.buffers[name] = torch.empty(shape, device=device)
    return have[: shape[0]]


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}


_SCRATCH = _Scratch()


def invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative weight exceeds its row's uniform share of the total: `[F]` int64.

    weights: `[F, a multiple of BLOCK]` float32, of any total. uniforms: `[F]` float64.
    """
    blocks = weights.unflatten(1, (-1, BLOCK))
    ends = torch.zeros(blocks.shape[0], blocks.shape[1] + 1, dtype=torch.float64, device=weights.device)
    torch.cumsum(blocks.sum(dim=2).double(), dim=1, out=ends[:, 1:])
    target = (uniforms * ends[:, -1]).unsqueeze(1)
    block = first_above(ends[:, 1:], target).clamp_(max=blocks.shape[1] - 1)
    chosen = blocks[torch.arange(blocks.shape[0], device=weights.device), block.squeeze(1)]
    inside = first_above(chosen.double().cumsum(dim=1), target - ends.gather(1, block))
    return (block * BLOCK + inside).squeeze(1)


def first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[F, 1]`: the first index whose value exceeds the target, never one that added nothing.

    Rounding may leave the target at or above the total; then it is where the total was reached.
    """
    return (cumulative <= torch.minimum(target, cumulative[:, -1:] * _BELOW_ONE)).sum(dim=1, keepdim=True)
