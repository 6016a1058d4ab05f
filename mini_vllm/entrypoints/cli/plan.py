"""`mini-vllm plan`: does a model fit, how many users, how fast at best, before anything is rented or downloaded.

Flags that the engine has, too, are called the same and mean the same. Nothing is run, except by `--measure`.
"""

import argparse
import dataclasses
import json
import shlex
from typing import Any

from mini_vllm.engine.arg_values import parse_size
from mini_vllm.entrypoints.cli.arguments import HelpFormatter
from mini_vllm.exceptions import ConfigError

_EXAMPLES = """\
examples:
  mini-vllm plan                                                    the bundled model on a desktop CPU
  mini-vllm plan --preset llama-3-8b --gpu a100-80g --context 8192 --explain
  mini-vllm plan DIR --gpu l4 --quantization awq --kv-cache-dtype fp8
  mini-vllm plan --preset llama-3-70b --gpu h100 -tp 4 --itl-slo-ms 30
  mini-vllm plan --preset llama-3-8b --gpu l4 --compare '--kv-cache-dtype fp8' --compare '--gpu a100'
  mini-vllm plan --num-layers 32 --hidden-size 4096 --num-heads 32 --num-kv-heads 8 --num-parameters 8e9 --gpu a100
  mini-vllm plan DIR --measure                                      on this machine, timed for a second or two
  mini-vllm plan --list-presets
"""
_SUPPRESS = argparse.SUPPRESS

_DIMENSIONS = {
    "num_layers": ("num_hidden_layers", "Layers."),
    "hidden_size": ("hidden_size", "Width of the residual stream."),
    "intermediate_size": ("intermediate_size", "Width inside the MLP."),
    "num_heads": ("num_attention_heads", "Query heads."),
    "num_kv_heads": ("num_key_value_heads", "Heads of keys and values."),
    "head_dim": ("head_dim", "Width of a head."),
    "vocab_size": ("vocab_size", "Tokens in the vocabulary."),
    "sliding_window": ("sliding_window", "Tokens a layer looks back."),
}
"""Flag -> (key of config.json, help)."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="what will it take? memory, users and speed by arithmetic",
        description="Does a model fit a machine, how many sequences at once, how fast at best? By arithmetic alone.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    _add_setup_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--explain", action="store_true", help="Show the formula behind each value, numbers filled in.")
    output.add_argument("--format", choices=("table", "json", "csv"), default="table", help="Default: table.")
    output.add_argument(
        "--compare", metavar="'FLAGS'", action="append", default=[],
        help="A further set-up beside this one: the same but for these flags, as in '-tp 2 --gpu h100' or gpu=h100. "
        "May be repeated.",
    )  # fmt: skip
    output.add_argument("-v", "--verbose", action="store_true", help="Show what is done on standard error.")
    output.add_argument("--list-presets", action="store_true", help="Show the models and machines known by name.")
    parser.set_defaults(run=run)


def _add_setup_flags(parser: argparse.ArgumentParser) -> None:
    _add_model_flags(parser)
    _add_machine_flags(parser)
    _add_engine_flags(parser)
    _add_workload_flags(parser)


def _flag(group: Any, name: str, kind: Any, text: str, *more: str, metavar: str = "N") -> None:
    """A flag that stays out of the namespace when it is not given: defaults live in `PlanOptions`."""
    group.add_argument(*more, "--" + name.replace("_", "-"), dest=name, type=kind, metavar=metavar, default=_SUPPRESS,
                       help=text)  # fmt: skip


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "model", nargs="?", metavar="MODEL", default=_SUPPRESS,
        help="Folder with config.json, GGUF file, preset, or name on the Hugging Face hub, of which only "
        "what describes it is fetched. Default: the bundled model.",
    )  # fmt: skip
    _flag(group, "preset", str, "A well-known model by name; see --list-presets.", metavar="NAME")
    _flag(group, "revision", str, "Branch, tag or commit of a model on the hub.", metavar="REV")
    _flag(group, "download_dir", str, "Where files of the hub are kept.", metavar="DIR")
    _flag(group, "dtype", str, "Precision of weights and activations. Default: the model's.", metavar="NAME")
    _flag(group, "quantization", str, "How weights are stored: fp8, int8, awq, q4_k_m, ...", "-q", metavar="NAME")
    for name, (_, text) in _DIMENSIONS.items():
        _flag(group, name, int, f"{text} In place of the model's, or one of the raw dimensions.")
    _flag(group, "num_parameters", _count, "Parameters in all, such as 8e9, in place of what the sizes come to.")
    _flag(group, "hf_overrides", _json_object, "More keys of config.json, such as '{\"kv_lora_rank\": 512}'.",
          metavar="JSON")  # fmt: skip


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    _flag(group, "gpu", str, "A machine by name; see --list-presets. Default: cpu-desktop-ddr5.", metavar="NAME")
    group.add_argument(
        "--measure", action="store_true", default=_SUPPRESS,
        help="Plan for this machine: its free memory, and its bandwidth and arithmetic, timed now.",
    )  # fmt: skip
    _flag(group, "gpu_memory", _size, "Memory of one device, such as 24G (2^30).", metavar="SIZE")
    _flag(group, "bandwidth", float, "Of its memory, in GB/s.", metavar="GB/S")
    _flag(group, "peak_flops", float, "Of its arithmetic, in TFLOP/s.", metavar="TFLOP/S")
    _flag(group, "link", str, "How devices are connected: nvlink4, pcie4, ethernet-10g, ...", metavar="NAME")
    _flag(group, "efficiency", float, "Share of bandwidth and arithmetic really reached. Default: 1.", metavar="X")


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine, as for serve")
    _flag(group, "max_model_len", _size, "Tokens a request may hold. Default: the model's limit.", metavar="SIZE")
    _flag(group, "kv_cache_dtype", str, "auto (the model's), bfloat16, int8, fp8, ...", metavar="NAME")
    _flag(group, "block_size", int, "Tokens in a KV cache block.")
    _flag(group, "gpu_memory_utilization", float, "Share of memory that may be used.", metavar="X")
    _flag(group, "kv_cache_memory_bytes", _size, "Bytes of the KV cache, in place of that share.", metavar="SIZE")
    _flag(group, "num_gpu_blocks_override", int, "Blocks of the KV cache, in place of both.")
    _flag(group, "max_num_seqs", int, "Requests that may run at once.")
    _flag(group, "max_num_batched_tokens", int, "Tokens one step may compute.")
    _flag(group, "long_prefill_token_threshold", int, "Tokens of one prompt a step may compute; 0 is no limit.")
    _flag(group, "tensor_parallel_size", int, "Devices that share every layer.", "-tp")
    _flag(group, "pipeline_parallel_size", int, "Devices that share the layers out.", "-pp")
    _flag(group, "max_loras", int, "Adapters in a step; 0 is none.")
    _flag(group, "max_lora_rank", int, "Rank every adapter slot has room for.")
    _flag(
        group, "lora_target_modules", _names, "Matrices adapted, such as q_proj,v_proj. Default: all.", metavar="NAMES"
    )
    _flag(group, "num_speculative_tokens", int, "Drafts a step; 0 is no speculation.")


def _add_workload_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    _flag(group, "context", _size, "Tokens a sequence holds. Default: max_model_len.", metavar="SIZE")
    _flag(group, "prompt_len", _size, "Tokens of the prompt that is timed. Default: half the context.", metavar="SIZE")
    _flag(group, "batch", int, "Sequences decoding together. Default: all that fit.")
    _flag(group, "shared_prefix_tokens", int, "Tokens that all sequences begin with.")
    _flag(group, "acceptance_rate", float, "Chance that a draft token is accepted. Default: 0.7.", metavar="X")
    _flag(group, "draft_cost", float, "Of one draft token, in steps of the model. Default: 0.05.", metavar="X")
    _flag(group, "max_bubble", float, "Idle share of a pipeline that is accepted. Default: 0.1.", metavar="X")
    _flag(group, "kv_transfer_gbps", float, "Gbit/s between machines for prefill and for decode.", metavar="X")
    _flag(group, "kv_transfer_overlap", float, "Share of the transfer hidden behind the prefill.", metavar="X")
    _flag(group, "itl_slo_ms", float, "Goal for the time between tokens: how large may a batch be?", metavar="MS")
    _flag(group, "ttft_slo_ms", float, "Goal for the first token: how long may a prompt be?", metavar="MS")
    _flag(group, "weight_bytes", _size, "Bytes of the weights, in place of what they come to.", metavar="SIZE")
    _flag(group, "activation_bytes", _size, "Bytes kept for activations, in place of the estimate.", metavar="SIZE")


# --- parsing -------------------------------------------------------------------------------------------------


def _size(text: str) -> int:
    size: int = _or_type_error(lambda: parse_size("size", text))
    return size


def _count(text: str) -> int:
    count: int = _or_type_error(lambda: int(float(text)))
    return count


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _json_object(text: str) -> dict[str, Any]:
    value = _or_type_error(lambda: json.loads(text))
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _or_type_error(parse: Any) -> Any:
    try:
        return parse()
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _CompareParser(argparse.ArgumentParser):
    """Flags inside --compare: an error there is ours to tell."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"compare: {message}")


def _setups(namespace: argparse.Namespace) -> list[dict[str, Any]]:
    """What was asked for, as it stands and with each --compare on top."""
    base = {k: v for k, v in vars(namespace).items() if k not in ("run", "command", "explain", "format", "compare")}
    setups = [base]
    for text in namespace.compare:
        parser = _CompareParser(add_help=False, allow_abbrev=False)
        _add_setup_flags(parser)
        changes = vars(parser.parse_args(_as_flags(text)))
        kept = dict(base)
        if "model" in changes or "preset" in changes:
            kept.pop("model", None), kept.pop("preset", None)
        if "gpu" in changes:
            kept.pop("measure", None)
        setups.append({**kept, **changes})
    return setups


def _as_flags(text: str) -> list[str]:
    """'--gpu h100 -tp 2' as it is; 'gpu=h100' is '--gpu=h100', since the shell's parser takes one flag for its own."""
    return [f"--{word}" if "=" in word and not word.startswith("-") else word for word in shlex.split(text)]


# --- running -------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    from mini_vllm.simulator.planner.render import render

    if args.list_presets:
        print(_presets())
        return 0
    plans = [_plan(setup) for setup in _setups(args)]
    for index, text in enumerate(args.compare, start=1):
        plans[index] = dataclasses.replace(plans[index], title=text)
    print(render(plans, args.format, args.explain))
    return 0


def _plan(given: dict[str, Any]) -> Any:
    from mini_vllm.simulator.planner.options import PlanOptions
    from mini_vllm.simulator.planner.plan import make_plan
    from mini_vllm.simulator.planner.source import resolve_model

    names = {field.name for field in dataclasses.fields(PlanOptions)}
    options = PlanOptions(**{name: value for name, value in given.items() if name in names})
    overrides = {key: given[name] for name, (key, _) in _DIMENSIONS.items() if name in given}
    model = resolve_model(
        given.get("model"),
        preset=given.get("preset"),
        overrides=overrides | given.get("hf_overrides", {}),
        num_parameters=options.num_parameters,
        revision=given.get("revision"),
        download_dir=given.get("download_dir"),
    )
    return make_plan(model, _machine(given, model, options), options)


def _machine(given: dict[str, Any], model: Any, options: Any) -> Any:
    from mini_vllm.simulator.planner import hardware
    from mini_vllm.simulator.planner.memory import quantisation, weight_bytes

    base: hardware.Hardware | None
    if given.get("measure"):
        if "gpu" in given:
            raise ConfigError("measure: times this machine, so --gpu cannot name another")
        dtype = model.dtype if options.dtype == "auto" else options.dtype
        base = hardware.measured_hardware(dtype, weight_bytes(model, dtype, quantisation(options.quantization)))
    elif "gpu" in given:
        base = hardware.hardware_preset(given["gpu"])
    else:
        all_given = {"gpu_memory", "bandwidth", "peak_flops"} <= given.keys()
        base = None if all_given else hardware.hardware_preset("cpu-desktop-ddr5")
    return hardware.custom_hardware(
        base,
        memory_bytes=given.get("gpu_memory"),
        bandwidth=_scaled(given, "bandwidth", 1e9),
        peak_flops=_scaled(given, "peak_flops", 1e12),
        link=given.get("link"),
    )


def _scaled(given: dict[str, Any], name: str, unit: float) -> float | None:
    return given[name] * unit if name in given else None


def _presets() -> str:
    from mini_vllm.simulator.planner.hardware import HARDWARE_PRESETS, LINKS
    from mini_vllm.simulator.planner.memory import QUANTISATIONS
    from mini_vllm.simulator.planner.presets import preset_geometry, preset_names
    from mini_vllm.simulator.planner.render import shown

    lines = ["models"]
    for name in preset_names():
        model = preset_geometry(name)
        per_token = shown(model.kv_bytes_per_token(model.dtype), "B")
        active = f", {model.active_parameters / 1e9:.3g}B active" if model.is_moe else ""
        lines.append(
            f"  {name:<20}{model.num_parameters / 1e9:8.3g}B  {model.kv_kind:<4} {per_token:>11} a token{active}"
        )
    lines += ["", "machines"]
    for machine in HARDWARE_PRESETS.values():
        peak = machine.peak_flops("bfloat16") / 1e12
        rates = f"{machine.bandwidth / 1e9:6,.0f} GB/s {peak:8,.4g} TFLOP/s (16-bit)"
        lines.append(f"  {machine.name:<20}{shown(machine.memory_bytes, 'B'):>11} {rates}  {machine.source}")
    lines += ["", f"links          {', '.join(LINKS)}", f"quantizations  {', '.join(QUANTISATIONS)}"]
    return "\n".join(lines)
