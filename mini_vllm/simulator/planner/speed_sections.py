"""The plan's sections about speed: the machine's roofline, decoding, prefill, and what a latency goal allows."""

from collections.abc import Callable

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.planner import roofline
from mini_vllm.simulator.planner.parallel import tp_comm_seconds_per_step
from mini_vllm.simulator.planner.plan import Line, Section
from mini_vllm.simulator.planner.setup import Setup


def speed_sections(s: Setup) -> list[Section]:
    made = [roofline_section(s), decode_section(s), prefill_section(s)]
    if s.options.itl_slo_ms is not None or s.options.ttft_slo_ms is not None:
        made.append(goal_section(s))
    return made


def roofline_section(s: Setup) -> Section:
    steps = s.steps
    ridge = roofline.ridge_point(steps.peak, steps.bandwidth)
    critical = roofline.critical_tokens(steps.peak, steps.bandwidth, steps.linear_bytes)
    devices = s.options.tensor_parallel_size
    per = f"{devices} x " if devices > 1 else ""
    share = "" if s.options.efficiency == 1 else f" x efficiency {s.options.efficiency:g}"
    lines = [
        Line("peak_flops", "arithmetic", steps.peak, "FLOP/s",
             f"{per}{steps.compute_dtype}{share}"),
        Line("bandwidth", "memory", steps.bandwidth, "B/s", f"{per}{s.hardware.bandwidth / 1e9:g} GB/s{share}"),
        Line("ridge_point", "ridge", ridge, "FLOP/B", "arithmetic / memory"),
        Line("critical_tokens", "critical batch", critical, "tokens",
             f"ridge x {steps.linear_bytes:g} B per weight / 2: from here on a step is bound by compute"),
    ]  # fmt: skip
    if s.model.is_moe:
        value = steps.critical_batch()
        text = (
            f"the same counting the experts the tokens reach, {s.model.experts_per_token} of {s.model.num_experts} each"
        )
        lines.append(Line("critical_tokens_moe", "critical batch of the mixture", value, "tokens", text))
    return Section("roofline", "Roofline", tuple(lines))


def decode_seconds(s: Setup, batch: int) -> float:
    """A decode step of `batch` sequences at the full context, all-reduces included."""
    return s.steps.decode(batch, s.context).seconds + _communication(s, batch)


def _communication(s: Setup, rows: int) -> float:
    link, width = s.hardware.link, 4 if s.dtype == "float32" else 2
    return tp_comm_seconds_per_step(
        s.model.num_layers, rows, s.model.hidden_size, s.options.tensor_parallel_size,
        link.bytes_per_second, link.latency_seconds, width,
    )  # fmt: skip


def weights_read(s: Setup, batch: int) -> float:
    """Bytes of weights behind a decode step: all; of experts, those that `batch` tokens are expected to reach."""
    parts = s.model.parameters
    idle = parts.experts * (1 - s.model.distinct_expert_share(batch)) if s.model.is_moe else 0
    return s.model_bytes * (1 - idle / parts.total)


def decode_section(s: Setup) -> Section:
    steps, batch = s.steps, s.batch
    intensity = roofline.arithmetic_intensity(1, steps.linear_bytes)
    ridge = roofline.ridge_point(steps.peak, steps.bandwidth)
    weights = weights_read(s, batch)
    alone, together = steps.bandwidth / weights_read(s, 1), steps.bandwidth / weights
    one, full = steps.decode(1, s.context), steps.decode(batch, s.context)
    seconds = decode_seconds(s, batch)
    equal = roofline.context_where_kv_equals_weights(weights, batch, max(1, s.model.kv_bytes_per_token(s.kv_dtype)))
    comm = f" + {_communication(s, batch) * 1e3:.3g} ms of all-reduces" if s.options.tensor_parallel_size > 1 else ""
    lines = (
        Line("decode_ceiling", "ceiling of one sequence", alone, "tok/s",
             f"{steps.bandwidth / 1e9:g} GB/s / {weights_read(s, 1) / 1e9:.4g} GB of weights"),
        Line("decode_utilisation", "arithmetic used by it", 100 * roofline.compute_utilisation(intensity, ridge), "%",
             f"{intensity:g} FLOP/B / ridge {ridge:.4g}"),
        Line("decode_ceiling_batch", "ceiling of the batch, weights alone", batch * together, "tok/s",
             f"{batch} x {steps.bandwidth / 1e9:g} GB/s / {weights / 1e9:.4g} GB, read once for all, no KV cache"),
        Line("decode_step_one", "step of one sequence", decode_seconds(s, 1), "s",
             f"max({one.num_bytes / 1e9:.4g} GB read, {one.flops / 1e9:.4g} GFLOP)"),
        Line("decode_step", "step of the batch", seconds, "s",
             f"max({full.num_bytes / 1e9:.4g} GB read incl. KV, {full.flops / 1e9:.4g} GFLOP){comm}"),
        Line("decode_tokens_per_second", "throughput", batch / seconds, "tok/s", f"{batch} / the step"),
        Line("decode_regime", "bound by", full.bound_by, "",
             f"memory {full.memory_seconds * 1e3:.4g} ms, compute {full.compute_seconds * 1e3:.4g} ms"),
        Line("kv_equals_weights", "KV cache outweighs weights from", equal, "tokens",
             f"{weights / 1e9:.4g} GB / ({batch} x {s.model.kv_bytes_per_token(s.kv_dtype):,} B) per sequence"),
    )  # fmt: skip
    return Section("decode", f"Decode, batch {batch} at {s.context:,} tokens", lines)


def prefill_section(s: Setup) -> Section:
    steps = s.steps.prefill(s.prompt_len, s.prefill_chunk)
    rows = min(s.prompt_len, s.prefill_chunk)
    comm = _communication(s, rows) * len(steps)
    seconds = sum(step.seconds for step in steps) + comm
    intensity = roofline.arithmetic_intensity(rows, s.steps.linear_bytes)
    worst = max(step.seconds for step in steps) + _communication(s, rows)
    ceiling = roofline.prefill_tokens_per_second(s.steps.peak, s.model.active_parameters)
    lines = (
        Line("prefill_ceiling", "ceiling", ceiling, "tok/s",
             f"{s.steps.peak / 1e12:g} TFLOP/s / (2 x {s.model.active_parameters:,})"),
        Line("prefill_steps", "steps", len(steps), "", f"{s.prompt_len:,} tokens in chunks of {s.prefill_chunk:,}"),
        Line("prefill_intensity", "intensity of a chunk", intensity, "FLOP/B",
             f"2 x {rows:,} tokens / {s.steps.linear_bytes:g} B per weight"),
        Line("prefill_regime", "bound by", steps[0].bound_by, "",
             f"memory {steps[0].memory_seconds * 1e3:.4g} ms, compute {steps[0].compute_seconds * 1e3:.4g} ms"),
        Line("ttft_floor", "TTFT at least", seconds, "s", "all its steps, attention included, nobody else there"),
        Line("itl_spike", "gap others see meanwhile", decode_seconds(s, s.batch) + worst, "s",
             "decode step + the longest chunk"),
    )  # fmt: skip
    return Section("prefill", f"Prefill of {s.prompt_len:,} tokens", lines)


def goal_section(s: Setup) -> Section:
    """Raises `ConfigError` when a goal is below what the hardware can do with nobody else there."""
    lines = []
    if s.options.itl_slo_ms is not None:
        goal = s.options.itl_slo_ms / 1e3
        lines.append(_largest_batch(s, goal))
    if s.options.ttft_slo_ms is not None:
        lines.append(_longest_prompt(s, s.options.ttft_slo_ms / 1e3))
    return Section("goals", "Goals", tuple(lines))


def _largest_batch(s: Setup, goal: float) -> Line:
    limit = max(1, int(s.max_concurrency))
    alone = decode_seconds(s, 1)
    if alone > goal:
        raise ConfigError(
            f"itl_slo_ms: {goal * 1e3:g} ms cannot be met: a decode step of one sequence at {s.context:,} tokens takes "
            f"{alone * 1e3:.4g} ms at best ({s.steps.decode(1, s.context).num_bytes / 1e9:.4g} GB at "
            f"{s.steps.bandwidth / 1e9:g} GB/s)"
        )
    batch = _last(limit, lambda n: decode_seconds(s, n) <= goal)
    text = f"largest whose decode step is within {goal * 1e3:g} ms, of {limit} that fit; "
    text += f"{batch / decode_seconds(s, batch):,.0f} tok/s"
    return Line("itl_slo_batch", "batch for the ITL goal", batch, "sequences", text)


def _longest_prompt(s: Setup, goal: float) -> Line:
    def seconds(prompt: int) -> float:
        return sum(
            step.seconds + _communication(s, s.prefill_chunk) for step in s.steps.prefill(prompt, s.prefill_chunk)
        )

    if seconds(1) > goal:
        raise ConfigError(
            f"ttft_slo_ms: {goal * 1e3:g} ms cannot be met: even a prompt of one token takes {seconds(1) * 1e3:.4g} ms"
        )
    prompt = _last(s.max_model_len, lambda n: seconds(n) <= goal)
    text = f"longest whose prefill is within {goal * 1e3:g} ms on an idle machine"
    return Line("ttft_slo_prompt", "prompt for the TTFT goal", prompt, "tokens", text)


def _last(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest n in [1, limit] for which `holds(n)`; it holds for 1 and stops holding once."""
    low, high = 1, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
