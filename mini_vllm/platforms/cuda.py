"""One NVIDIA GPU through torch: the current device of this process."""

from typing import TYPE_CHECKING

from mini_vllm.platforms.interface import Platform

if TYPE_CHECKING:
    import torch


class CudaPlatform(Platform):
    """The GPU that torch calls current; `CUDA_VISIBLE_DEVICES` chooses another."""

    device_type = "cuda"
    pin_memory = True

    def device(self) -> "torch.device":
        import torch

        return torch.device("cuda", torch.cuda.current_device())

    def supports_bf16(self) -> bool:
        import torch

        return torch.cuda.get_device_capability() >= (8, 0)

    def explain_auto_dtype(self, checkpoint_dtype: str | None, *, native_kernels: bool = False) -> tuple[str, str]:
        """The checkpoint's own dtype, except that float32 halves and bfloat16 needs a GPU that has it."""
        half = "bfloat16" if self.supports_bf16() else "float16"
        if checkpoint_dtype == "float16":
            return "float16", "the checkpoint's own"
        if checkpoint_dtype == "bfloat16" and half == "bfloat16":
            return "bfloat16", "the checkpoint's own"
        why = "this GPU has bfloat16" if half == "bfloat16" else "this GPU has no bfloat16"
        return half, f"the checkpoint has {checkpoint_dtype or 'no dtype'} and {why}"

    def dtype_warning(self, dtype: str, *, native_kernels: bool = False) -> str | None:
        if dtype == "bfloat16" and not self.supports_bf16():
            return "this GPU has no bfloat16 instructions (compute capability below 8.0), so bfloat16 is emulated"
        return None

    def available_memory_bytes(self) -> int:
        """Free memory of the device, and what torch's allocator holds but does not use."""
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def total_memory_bytes(self) -> int:
        import torch

        return int(torch.cuda.mem_get_info()[1])

    def describe(self) -> str:
        import torch

        gib = self.available_memory_bytes() / 2**30
        return f"cuda ({torch.cuda.get_device_name()}), {gib:.1f} GiB of memory free"

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()
