"""Host memory that the device sees.

Step inputs are written with numpy into buffers that were allocated once at their largest size. Where device and host
share memory the tensor is the buffer; elsewhere it is a copy, refreshed without waiting from page-locked memory.
"""

import torch

from mini_vllm.platforms import Platform


class HostBuffer:
    """`np` is what the host writes; `upload(n)` is its first `n` entries as a tensor on the device."""

    def __init__(self, shape: int | tuple[int, ...], dtype: torch.dtype, platform: Platform) -> None:
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=platform.pin_memory)
        self.np = self.host.numpy()
        self.tensor = self.host.to(platform.device())  # the very same tensor where there is nothing to copy to
        self._view, self._viewed = self.tensor, self.tensor.shape[0]

    def upload(self, n: int) -> torch.Tensor:
        """The first `n` entries (rows) on the device. Valid until the host writes again."""
        if self.tensor is not self.host:
            self.tensor[:n].copy_(self.host[:n], non_blocking=True)
        if self._viewed != n:
            self._view, self._viewed = self.tensor[:n], n
        return self._view
