"""Constants of machines: memory, bandwidth, arithmetic, links. What a data sheet promises, not what a kernel reaches.

Arithmetic is dense (no sparsity), in multiply-adds counted as two operations, with the matrix units where there are
any. Memory is what the driver reports, where that is known to differ from the name. `source` names the document
a figure is commonly quoted from; none was checked against it line by line, so give your own constants where it matters.
A machine at hand is measured instead: `measured_hardware`.
"""

from dataclasses import dataclass, field, replace

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.planner.presets import nearest

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Link:
    """A connection between devices: bytes per second in one direction per device, and the latency of one hop."""

    name: str
    bytes_per_second: float
    latency_seconds: float


@dataclass(frozen=True)
class Hardware:
    """One device. flops: operations per second by dtype ('bfloat16' stands for float16, too).

    packs_weights: kernels read weights in a layout of their own; a matrix that rows are gathered from is there twice.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    """Bytes per second of device memory."""
    flops: dict[str, float]
    link: Link
    source: str
    measured: bool = False
    packs_weights: bool = False
    details: dict[str, str] = field(default_factory=dict)

    def peak_flops(self, dtype: str) -> float:
        """For arithmetic in `dtype`. Raises `ConfigError` for one the device has no units for."""
        key = {"float16": "bfloat16", "int8": "int8", "fp8": "fp8"}.get(dtype, dtype)
        if key not in self.flops:
            raise ConfigError(
                f"gpu: {self.name} has no matrix arithmetic in {dtype} (it has {', '.join(sorted(self.flops))})"
            )
        return self.flops[key]

    def has(self, dtype: str) -> bool:
        return dtype in self.flops or dtype == "float16"

    def ridge(self, dtype: str) -> float:
        """Operations per byte at which arithmetic takes as long as memory."""
        return self.peak_flops(dtype) / self.bandwidth


LINKS = {
    "nvlink3": Link("nvlink3", 300e9, 3e-6),
    "nvlink4": Link("nvlink4", 450e9, 3e-6),
    "nvlink5": Link("nvlink5", 900e9, 3e-6),
    "infinity-fabric": Link("infinity-fabric", 448e9, 3e-6),
    "pcie3": Link("pcie3", 16e9, 5e-6),
    "pcie4": Link("pcie4", 32e9, 5e-6),
    "pcie5": Link("pcie5", 64e9, 5e-6),
    "infiniband-400g": Link("infiniband-400g", 50e9, 5e-6),
    "infiniband-200g": Link("infiniband-200g", 25e9, 5e-6),
    "ethernet-100g": Link("ethernet-100g", 12.5e9, 20e-6),
    "ethernet-25g": Link("ethernet-25g", 3.125e9, 30e-6),
    "ethernet-10g": Link("ethernet-10g", 1.25e9, 50e-6),
    "memory": Link("memory", 50e9, 1e-6),
}
"""Per direction: NVLink's advertised total is both. Latencies are assumptions of the usual order, not measurements."""


def _gpu(
    name: str, memory_mib: int, tb_s: float, tflops: float, link: str, source: str, **more: float
) -> tuple[str, Hardware]:
    """tflops: 16-bit, accumulated in float32. more: float32=, fp8=, int8= in tera-operations per second."""
    flops = {"bfloat16": tflops * 1e12} | {dtype: value * 1e12 for dtype, value in more.items()}
    return name, Hardware(name, memory_mib * MIB, tb_s * 1e12, flops, LINKS[link], source)


HARDWARE_PRESETS: dict[str, Hardware] = dict(
    (
        _gpu("t4", 15360, 0.320, 65, "pcie3", "NVIDIA T4 data sheet (float16 only)", float32=8.1, int8=130),
        _gpu("a10", 23028, 0.600, 125, "pcie4", "NVIDIA A10 data sheet", float32=31.2, int8=250),
        _gpu("l4", 23034, 0.300, 121, "pcie4", "NVIDIA L4 data sheet, halved where it states sparsity",
             float32=30.3, fp8=242.5, int8=242.5),
        _gpu("l40s", 46068, 0.864, 362, "pcie4", "NVIDIA L40S data sheet", float32=91.6, fp8=733, int8=733),
        _gpu("rtx-3090", 24576, 0.936, 71, "pcie4", "NVIDIA GA102 white paper (float32 accumulate)",
             float32=35.6, int8=284),
        _gpu("rtx-4090", 24564, 1.008, 165.2, "pcie4", "NVIDIA Ada white paper (float32 accumulate)",
             float32=82.6, fp8=330.3, int8=660.6),
        _gpu("a100-40g", 40960, 1.555, 312, "nvlink3", "NVIDIA A100 data sheet", float32=19.5, int8=624),
        _gpu("a100-80g", 81920, 2.0, 312, "nvlink3",
             "NVIDIA A100 data sheet; bandwidth rounded between PCIe (1.935) and SXM (2.039)", float32=19.5, int8=624),
        _gpu("h100", 81559, 3.35, 990, "nvlink4", "NVIDIA H100 SXM data sheet, halved where it states sparsity",
             float32=67, fp8=1979, int8=1979),
        _gpu("h200", 143771, 4.8, 990, "nvlink4", "NVIDIA H200 data sheet, halved where it states sparsity",
             float32=67, fp8=1979, int8=1979),
        _gpu("b200", 183359, 8.0, 2250, "nvlink5", "NVIDIA B200 (HGX) data sheet, dense", float32=75, fp8=4500,
             int8=4500),
        _gpu("mi300x", 196288, 5.3, 1307, "infinity-fabric", "AMD MI300X data sheet, dense", float32=163.4, fp8=2615,
             int8=2615),
        ("cpu-epyc-9654", Hardware(
            "cpu-epyc-9654", 384 * GIB, 460.8e9, {"float32": 7.4e12, "bfloat16": 14.7e12}, LINKS["memory"],
            "96 Zen 4 cores at 2.4 GHz x 32 (float32) or 64 (bfloat16) operations a cycle; 12 channels DDR5-4800; "
            "384 GiB assumed", packs_weights=True)),
        ("cpu-xeon-8480", Hardware(
            "cpu-xeon-8480", 512 * GIB, 307.2e9, {"float32": 7.2e12, "bfloat16": 229e12}, LINKS["memory"],
            "56 cores at 2.0 GHz x 64 (AVX-512 float32) or 2048 (AMX bfloat16) operations a cycle; 8 channels "
            "DDR5-4800; 512 GiB assumed", packs_weights=True)),
        ("cpu-desktop-ddr5", Hardware(
            "cpu-desktop-ddr5", 32 * GIB, 89.6e9, {"float32": 1.0e12, "bfloat16": 1.0e12}, LINKS["memory"],
            "8 cores at 4 GHz x 32 operations a cycle (AVX2); 2 channels DDR5-5600; 32 GiB assumed",
            packs_weights=True)),
    )
)  # fmt: skip


def hardware_preset(name: str) -> Hardware:
    """Raises `ConfigError` with the nearest names."""
    key = {"a100": "a100-80g", "a100-80gb": "a100-80g", "a100-40gb": "a100-40g"}.get(name.lower(), name.lower())
    if key not in HARDWARE_PRESETS:
        raise ConfigError(f"gpu: no machine is called {name!r}{nearest(key, list(HARDWARE_PRESETS))}")
    return HARDWARE_PRESETS[key]


def link_preset(name: str) -> Link:
    if name.lower() not in LINKS:
        raise ConfigError(f"link: none is called {name!r}{nearest(name.lower(), list(LINKS))}")
    return LINKS[name.lower()]


def custom_hardware(
    base: Hardware | None,
    *,
    memory_bytes: int | None = None,
    bandwidth: float | None = None,
    peak_flops: float | None = None,
    link: str | None = None,
) -> Hardware:
    """`base` with constants of one's own; without a base all three are needed. Raises `ConfigError`."""
    given = {"gpu_memory": memory_bytes, "bandwidth": bandwidth, "peak_flops": peak_flops}
    for name, value in given.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name}: must be above 0, got {value!r}")
    if base is None:
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ConfigError(f"gpu: name a preset ({', '.join(HARDWARE_PRESETS)}) or give {', '.join(missing)}, too")
        assert memory_bytes is not None and bandwidth is not None and peak_flops is not None
        flops = dict.fromkeys(("float32", "bfloat16", "fp8", "int8"), peak_flops)
        base = Hardware("custom", memory_bytes, bandwidth, flops, LINKS["pcie4"], "given on the command line")
    elif any(value is not None for value in given.values()):
        flops = base.flops if peak_flops is None else dict.fromkeys(base.flops, peak_flops)
        base = replace(
            base,
            name=f"{base.name} (changed)",
            memory_bytes=memory_bytes or base.memory_bytes,
            bandwidth=bandwidth or base.bandwidth,
            flops=flops,
            source=f"{base.source}; changed by arguments",
        )
    return base if link is None else replace(base, link=link_preset(link))


def measured_hardware(dtype: str, working_set_bytes: int) -> Hardware:
    """The machine this runs on, timed for a second or two: read bandwidth and matrix products in `dtype`."""
    from mini_vllm.bench.ceilings import measure_ceilings
    from mini_vllm.platforms import current_platform

    ceilings = measure_ceilings(dtype, working_set_bytes)
    return Hardware(
        name="this machine",
        memory_bytes=current_platform.available_memory_bytes(),
        bandwidth=ceilings.read_gb_s * 1e9,
        flops={"bfloat16" if dtype == "float16" else dtype: ceilings.gemm.gflop_s * 1e9},
        link=LINKS["memory"],
        source=f"measured: {ceilings.read_source} read by {ceilings.memory.kernel}, {ceilings.gemm.size}^2 product in "
        f"{ceilings.gemm.dtype}, {ceilings.threads} threads on {ceilings.device}",
        measured=True,
        packs_weights=current_platform.device_type == "cpu",
        details={"others_share": f"{ceilings.others_share}"},
    )
