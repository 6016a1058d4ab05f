"""From timed runs to the one dict that is printed and written: figures, spread, ceilings, model, machine, arguments.

Names are those of vLLM's benchmark files where it has them (`output_throughput`, `mean_ttft_ms`, ...). Top-level
figures are medians over the repetitions; `spread` holds [min, max] of each, `repetitions` every value of every one.
"""

import json
import os
import struct
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mini_vllm.bench.ceilings import Ceilings, measure_ceilings
from mini_vllm.bench.cost import ModelShape
from mini_vllm.bench.driver import Run, core_of
from mini_vllm.bench.environment import collect_environment
from mini_vllm.bench.metrics import median_and_spread, request_metrics
from mini_vllm.bench.noise import NOISE_LIMIT
from mini_vllm.bench.roofline import PHASES, binding_ceiling, flat_uses, phase_uses
from mini_vllm.config import EngineConfig
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.exceptions import ConfigError

FORMAT_VERSION = 1


def build_result(
    benchmark: str, engine: LLMEngine, runs: Sequence[Run], arguments: Mapping[str, Any], *, detailed: bool = False
) -> dict[str, Any]:
    """The whole report of `benchmark` ('latency' or 'throughput'). detailed: keep every inter-token latency.

    Measures the machine's ceilings (a second or two) if this process has not done so before.
    """
    config = config_of(engine)
    shape = model_shape(engine)
    working_set = shape.weight_bytes + round(max(run.peak_kv_cache_usage for run in runs) * kv_pool_bytes(engine))
    ceilings = measure_ceilings(shape.dtype, working_set)
    figures = [run_figures(run, shape, ceilings) for run in runs]
    medians, spread = median_and_spread(figures)
    repetitions = [number | _raw(run, detailed) for number, run in zip(figures, runs, strict=True)]
    model = describe_model(engine, shape) | {"working_set_bytes": working_set}
    return {
        "benchmark": benchmark,
        "format_version": FORMAT_VERSION,
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": "mini_vllm",
        "model_id": config.model.model,
        "tokenizer_id": config.model.tokenizer,
        "num_prompts": len(runs[0].timelines),
        "num_repeats": len(runs),
        **medians,
        **{f"{_prefix(phase)}_bound_by": _bound(medians, phase, ceilings) for phase in PHASES},
        "spread": spread,
        "repetitions": repetitions,
        "notes": notes(runs, ceilings, model),
        "model": model,
        "ceilings": ceilings.as_dict(),
        "arguments": dict(arguments),
        "environment": collect_environment(),
    }


def run_figures(run: Run, shape: ModelShape, ceilings: Ceilings) -> dict[str, Any]:
    """Every number of one run, flat."""
    return {
        **request_metrics(run.timelines, run.duration),
        "num_steps": len(run.steps),
        "num_preemptions": run.num_preemptions,
        "prefix_cache_hit_rate": run.prefix_cache_hit_rate,
        "peak_kv_cache_usage": run.peak_kv_cache_usage,
        **flat_uses(phase_uses(run.steps, shape, ceilings)),
        "cpu_share_own": run.noise.own_share,
        "cpu_share_others": run.noise.others_share,
        "cpu_share_stolen": run.noise.steal_share,
    }


def _prefix(phase: str) -> str:
    return "achieved" if phase == "all" else phase


def _bound(medians: Mapping[str, Any], phase: str, ceilings: Ceilings) -> str | None:
    prefix = _prefix(phase)
    return binding_ceiling(medians[f"{prefix}_read_share"], medians[f"{prefix}_compute_share"], ceilings.read_source)


def _raw(run: Run, detailed: bool) -> dict[str, Any]:
    """One list entry a request, in the order of the requests; seconds to the microsecond."""

    def rounded(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds, 6)

    lines = run.timelines
    raw: dict[str, Any] = {
        "input_lens": [line.num_prompt_tokens for line in lines],
        "output_lens": [line.num_output_tokens for line in lines],
        "ttfts": [rounded(line.ttft) if line.output_times else None for line in lines],
        "tpots": [rounded(line.tpot) if line.output_times else None for line in lines],
        "e2els": [rounded(line.e2el) if line.output_times else None for line in lines],
        "finish_reasons": dict(Counter(str(line.finish_reason) for line in lines)),
    }
    return raw | ({"itls": [[rounded(gap) for gap in line.itl] for line in lines]} if detailed else {})


# --- the model ----------------------------------------------------------------------------------------------


def config_of(engine: LLMEngine) -> EngineConfig:
    """The engine's configuration. Raises `ConfigError` for an engine that was put together without one."""
    if engine.config is None:
        raise ConfigError("bench: needs an engine that was built from EngineArgs")
    return engine.config


def model_shape(engine: LLMEngine) -> ModelShape:
    """Sizes of the loaded model; which layers have a sliding window is told by the KV cache's groups."""
    config = config_of(engine)
    groups = core_of(engine).executor.kv_cache_config().groups
    windows = [(group.spec.sliding_window, len(group.layer_names)) for group in groups]
    return ModelShape.from_config(config.model.hf_config, config.model.dtype, windows)


def kv_pool_bytes(engine: LLMEngine) -> int:
    """Bytes of the KV cache that requests can use (all blocks but the null block)."""
    kv_config = core_of(engine).executor.kv_cache_config()
    return (kv_config.num_blocks - 1) * kv_config.bytes_per_block


def describe_model(engine: LLMEngine, shape: ModelShape) -> dict[str, Any]:
    hf = config_of(engine).model.hf_config
    kv_config = core_of(engine).executor.kv_cache_config()
    return {
        "architectures": list(hf.architectures),
        "dtype": shape.dtype,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "tied_embeddings": shape.tied_embeddings,
        "max_model_len": engine.max_model_len,
        "num_parameters": shape.num_parameters,
        "checkpoint_parameters": checkpoint_parameters(config_of(engine).model.model),
        "weight_bytes": shape.weight_bytes,
        "weight_bytes_per_decode_step": shape.weight_bytes_per_decode_step,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "block_size": kv_config.block_size,
        "num_blocks": kv_config.num_blocks,
        "kv_cache_bytes_per_block": kv_config.bytes_per_block,
    }


def checkpoint_parameters(folder: str | Path) -> int | None:
    """Elements of all tensors in the folder's safetensors files, from their headers; None where there are none."""
    total = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    total += _product(entry["shape"])
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return None
    return total or None


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


# --- notes --------------------------------------------------------------------------------------------------


def notes(runs: Sequence[Run], ceilings: Ceilings, model: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures must know; one line a kind, however many repetitions it happened in."""
    found = _notes_on_runs(runs)
    if (ceilings.others_share or 0.0) > NOISE_LIMIT:
        found.append(
            f"warning: others used {ceilings.others_share:.0%} of the CPUs while the ceilings were measured: "
            "they are too low, and shares of them too high"
        )
    cache, working_set = ceilings.last_level_cache_bytes, model["working_set_bytes"]
    if ceilings.working_set is not None:
        verb = "fit" if working_set <= cache else "nearly fit"
        found.append(
            f"weights and KV cache in use ({working_set / 1e6:.1f} MB) {verb} the last-level cache "
            f"({cache / 1e6:.1f} MB): DRAM is not what bounds reading, so shares are of the rate measured over a "
            f"buffer of that size ({ceilings.read_gb_s:.1f} GB/s)"
        )
    counted, stored = model["num_parameters"], model["checkpoint_parameters"]
    if stored is not None and abs(counted - stored) > 0.01 * stored:
        found.append(
            f"warning: the checkpoint holds {stored:,} parameters, but {counted:,} were counted from its config: "
            "GB/s, GFLOP/s and shares are off by as much"
        )
    return found


def _notes_on_runs(runs: Sequence[Run]) -> list[str]:
    def of_all(part: Sequence[Run]) -> str:
        return f"in {len(part)} of {len(runs)} repetitions" if len(runs) > 1 else "in this run"

    found = []
    if noisy := [run for run in runs if run.noise.noisy]:
        others = max(run.noise.others_share or 0.0 for run in noisy)
        stolen = max(run.noise.steal_share or 0.0 for run in noisy)
        found.append(
            f"warning: {of_all(noisy)} others used more than {NOISE_LIMIT:.0%} of the CPUs (up to {others:.0%}, and "
            f"{stolen:.0%} stolen by the hypervisor): repeat on a quiet machine"
        )
    if unknown := [run for run in runs if run.noise.others_share is None]:
        found.append(f"{of_all(unknown)} the CPU share of others is not known (too short, or no /proc)")
    if preempted := [run for run in runs if run.num_preemptions]:
        most = max(run.num_preemptions for run in preempted)
        found.append(
            f"{of_all(preempted)} there were preemptions (up to {most}): the KV cache was too small for these requests "
            "at once, and tokens were computed again"
        )
    return found + [f"failed: {error}" for run in runs for error in run.errors[:3]]


# --- writing ------------------------------------------------------------------------------------------------


def require_writable(path: str | Path) -> Path:
    """`path`, checked before minutes are spent on what would go there. Raises `ConfigError`."""
    target = Path(path).expanduser()
    if target.is_dir():
        raise ConfigError(f"output_json: {target} is a folder; a file is needed")
    if not target.parent.is_dir():
        raise ConfigError(f"output_json: the folder {target.parent} does not exist")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ConfigError(f"output_json: {target} cannot be written")
    return target


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write all or nothing. Non-finite numbers do not occur: what is unknown is null."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
