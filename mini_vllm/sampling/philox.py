"""Random numbers that are a function, not a state: Philox4x32-10, counted rather than advanced.

The n-th draw of a seed is computed from (seed, n) alone, so a request samples the same tokens whoever shares its
batch, however its prompt was chunked and however often it was preempted; there is no generator to save or move.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import numpy as np
import numpy.typing as npt

UInt32 = npt.NDArray[np.uint32]

_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * _WEYL


def philox4x32(counter: UInt32, key: UInt32) -> UInt32:
    """The Philox4x32-10 block function on columns: counter `[4, N]`, key `[2, N]` -> `[4, N]`, all uint32.

    Column i is the generator of Random123 applied to (counter[:, i], key[:, i]).
    """
    even = counter[0::2].astype(np.uint64)
    odd = counter[1::2].astype(np.uint64)
    for round_key in (key + _STEPS) & _LOW:
        product = even * _MULTIPLIERS
        even = (product >> _SHIFT)[::-1] ^ odd ^ round_key
        odd = (product & _LOW)[::-1]
    out = np.empty(counter.shape, dtype=np.uint32)
    out[0::2] = even
    out[1::2] = odd
    return out


def uniform(seed: npt.NDArray[np.uint64], draw_index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Draw number `draw_index[i]` of `seed[i]`: float64 `[N]` in [0, 1), multiples of 2^-53.

    The seed is the key, the draw index the low half of the counter; two of the four output words are used.
    """
    counter = np.zeros((4, len(seed)), dtype=np.uint32)
    index = draw_index.astype(np.uint64)
    counter[0] = index & _LOW
    counter[1] = index >> _SHIFT
    key = np.empty((2, len(seed)), dtype=np.uint32)
    key[0] = seed & _LOW
    key[1] = seed >> _SHIFT
    words = philox4x32(counter, key)
    result: npt.NDArray[np.float64] = (words[0] >> 5) * 2.0**-27 + (words[1] >> 6) * 2.0**-53
    return result
