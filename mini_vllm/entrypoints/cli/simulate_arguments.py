"""Flags of `mini-vllm simulate`, and the `Scenario` they describe.

Flags that the engine has, too, are called the same and mean the same; those of the model and the machine are the
planner's. What is not given stays out of the namespace, so that defaults live in the options classes.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mini_vllm.engine.arg_values import parse_size, parse_tenant_weights
from mini_vllm.entrypoints.cli import plan as plan_flags
from mini_vllm.exceptions import ConfigError

if TYPE_CHECKING:
    from mini_vllm.simulator.cost import CostModel
    from mini_vllm.simulator.planner.setup import Setup
    from mini_vllm.simulator.scenario import Scenario

_SUPPRESS = argparse.SUPPRESS
COST_MODELS = ("roofline", "two-constant", "fitted")
ROUTINGS = ("round-robin", "least-loaded", "prefix-aware")
"""Those of `simulator.options`, which loads numpy, while flags have to be there at once."""

_ENGINE = {
    "max_num_seqs": (int, "Requests that may run at once."),
    "max_num_batched_tokens": (int, "Tokens one step may compute."),
    "long_prefill_token_threshold": (int, "Tokens of one prompt a step may compute; 0 is no limit."),
    "block_size": (int, "Tokens in a KV cache block."),
    "num_gpu_blocks_override": (int, "Blocks of each replica's KV cache, the null block included."),
    "kv_cache_memory_bytes": (str, "Bytes of the KV cache, such as 2G."),
    "gpu_memory_utilization": (float, "Share of the machine's memory that may be used."),
    "max_model_len": (str, "Tokens a request may hold. Default: the model's limit."),
    "tensor_parallel_size": (int, "Devices that share every layer of a replica."),
}
_PLANNED = ("dtype", "quantization", "kv_cache_dtype", "efficiency")
"""What the planner is told beside the engine's flags."""

_WORKLOAD = {
    "num_requests": (int, "Requests in all, every turn counted. Default: 1000, or the whole trace."),
    "rate": (float, "Conversations (requests, when they have one turn) that begin per second."),
    "burstiness": (float, "Shape of gamma arrivals: 1 is Poisson, less comes in bursts, more is steadier."),
    "users": (int, "A closed system: so many users, each sends when the last answer is there."),
    "think_time": (float, "Mean seconds a user thinks before the next turn or conversation."),
    "prompt_len": (str, "512, uniform:LOW,HIGH, lognormal:MEAN,SIGMA[,LIMIT], zipf:EXPONENT,LARGEST or trace:FILE."),
    "output_len": (str, "The same for outputs."),
    "turns": (str, "Turns of a conversation, as a length; each carries the history in its prompt."),
    "shared_prefix_tokens": (int, "Tokens that the prompts of a group begin with, on top of --prompt-len."),
    "num_prefix_groups": (int, "Groups, each with a prefix of its own."),
    "prefix_skew": (float, "How uneven the groups are: popularity is rank to the power of minus this."),
    "trace": (str, "Replay this JSONL file, written by serve --record-trace or in Mooncake's format."),
    "trace_speed": (float, "2 replays it in half the time."),
    "seed": (int, "Of everything random."),
}
_METAVARS = {int: "N", float: "X", str: "VALUE"}


def add_scenario_flags(parser: argparse.ArgumentParser) -> None:
    _add_model_flags(parser)
    plan_flags._add_machine_flags(parser)
    engine = parser.add_argument_group("engine, as for serve")
    _add_all(engine, _ENGINE)
    _add_policy_flags(engine)
    workload = parser.add_argument_group("workload")
    workload.add_argument(
        "--arrivals", choices=("poisson", "gamma", "fixed", "at-once", "closed"), default=_SUPPRESS,
        help="Default: poisson with --rate, gamma with --burstiness, closed with --users, else all at once.",
    )  # fmt: skip
    _add_all(workload, _WORKLOAD)
    workload.add_argument(
        "--tenant", action="append", metavar="NAME[,KEY=VALUE...]", dest="tenants", default=_SUPPRESS,
        help="A tenant with share=, prompt_len=, output_len=, priority=, users=; several make a mix. Values with "
        "commas use semicolons: chat,share=2,prompt_len=uniform:10;200.",
    )  # fmt: skip
    _add_cost_flags(parser)
    goals = parser.add_argument_group("goals, for goodput")
    for name, text in (("ttft", "the first token"), ("tpot", "each token after it"), ("e2el", "the whole answer")):
        _flag(goals, f"{name}_slo_ms", float, f"Limit for {text} of a good request.", "MS")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    _flag(
        group, "model", str, "As for plan: folder, GGUF file, preset or hub name. Default: the bundled model.", "MODEL"
    )
    _flag(group, "preset", str, "A well-known model by name; see plan --list-presets.", "NAME")
    _flag(group, "dtype", str, "Precision of weights and activations. Default: the model's.", "NAME")
    _flag(group, "quantization", str, "How weights are stored: fp8, int8, awq, q4_k_m, ...", "NAME")
    _flag(group, "kv_cache_dtype", str, "auto (the model's), bfloat16, int8, fp8, ...", "NAME")
    _flag(group, "hf_overrides", plan_flags._json_object, "Keys of config.json in place of the model's.", "JSON")


def _add_policy_flags(group: Any) -> None:
    group.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=_SUPPRESS,
                       help="Reuse the KV cache of prompts that begin alike.")  # fmt: skip
    group.add_argument(
        "--scheduling-policy", choices=("fcfs", "priority", "fair"), default=_SUPPRESS, help="Who goes next."
    )
    group.add_argument(
        "--preemption-policy", choices=("latest", "least-work"), default=_SUPPRESS, help="Who gives way."
    )
    _flag(group, "tenant_weights", str, "Shares under the policy fair, such as batch=0.5,chat=2.", "NAME=X,...")
    _flag(group, "num_replicas", int, "Engines side by side.")
    group.add_argument("--routing", choices=ROUTINGS, default=_SUPPRESS, help="Which of them gets a request.")


def _add_cost_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cost of a step")
    group.add_argument(
        "--cost-model", choices=COST_MODELS, default=_SUPPRESS,
        help="roofline (of model and machine), two-constant, or fitted. Default: what the flags below imply.",
    )  # fmt: skip
    _flag(group, "step_ms", float, "two-constant: milliseconds of every step.", "MS")
    _flag(group, "token_us", float, "two-constant: microseconds of every token in it.", "US")
    _flag(group, "cost_file", str, "fitted: what --calibrate wrote.", "FILE")
    _flag(group, "request_latency_ms", float, "What a request spends outside the engine, on its way in and back.", "MS")


def _add_all(group: Any, flags: Mapping[str, tuple[type, str]]) -> None:
    for name, (kind, text) in flags.items():
        _flag(group, name, kind, text)


def _flag(group: Any, name: str, kind: Any, text: str, metavar: str | None = None) -> None:
    group.add_argument(
        "--" + name.replace("_", "-"), dest=name, type=kind, metavar=metavar or _METAVARS[kind], default=_SUPPRESS,
        help=text.replace("%", "%%"),
    )  # fmt: skip


# --- from flags to a scenario -----------------------------------------------------------------------------------


def scenario_from(given: Mapping[str, Any], *, step_records: int = 0) -> "Scenario":
    """What was asked for. Raises `ConfigError`."""
    from mini_vllm.simulator.options import SimulationOptions
    from mini_vllm.simulator.results import SLO
    from mini_vllm.simulator.scenario import Scenario

    cost = _cost_from(given)
    sized_by_hand = cost is not None and "num_gpu_blocks_override" in given and not _names_a_machine(given)
    setup = None if sized_by_hand else _setup_from(given)
    own = _chosen(SimulationOptions, given) | {"step_records": step_records}
    if "tenant_weights" in given:
        own["tenant_weights"] = parse_tenant_weights(given["tenant_weights"])
    if setup is None:
        own["num_gpu_blocks"] = given["num_gpu_blocks_override"]
        own |= _sizes(given, "max_model_len")
    else:
        for name in ("max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens"):
            own.pop(name, None)  # the set-up has them
    limits = {f"{name}_ms": given.get(f"{name}_slo_ms") for name in ("ttft", "tpot", "e2el")}
    slo = SLO(**limits)
    return Scenario(_workload_from(given), SimulationOptions(**own), cost, setup, slo if slo else None)


def _names_a_machine(given: Mapping[str, Any]) -> bool:
    return any(name in given for name in ("model", "preset", "gpu", "measure", "gpu_memory", "kv_cache_memory_bytes"))


def _setup_from(given: Mapping[str, Any]) -> "Setup":
    from mini_vllm.simulator.planner.options import PlanOptions
    from mini_vllm.simulator.planner.setup import Setup
    from mini_vllm.simulator.planner.source import resolve_model

    sizes = _sizes(given, "max_model_len", "kv_cache_memory_bytes")
    asked = {name: given[name] for name in (*_ENGINE, *_PLANNED) if name in given}
    options = PlanOptions(**asked | sizes)
    model = resolve_model(given.get("model"), preset=given.get("preset"), overrides=given.get("hf_overrides"))
    return Setup(model, plan_flags._machine(dict(given), model, options), options)


def _workload_from(given: Mapping[str, Any]) -> Any:
    from mini_vllm.simulator.workload import WorkloadOptions

    chosen = _chosen(WorkloadOptions, given)
    if "tenants" in chosen:
        chosen["tenants"] = tuple(parse_tenant(text) for text in chosen["tenants"])
    return WorkloadOptions(**chosen)


def parse_tenant(text: str) -> Any:
    """`NAME,share=2,prompt_len=uniform:10;200`. Raises `ConfigError`."""
    from mini_vllm.simulator.workload import TenantMix

    kinds: dict[str, Any] = {"share": float, "prompt_len": str, "output_len": str, "priority": int, "users": int}
    name, *parts = [part.strip() for part in text.split(",")]
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in kinds:
            raise ConfigError(f"tenant: {part!r} must be one of {', '.join(kinds)} with a value, in {text!r}")
        try:
            values[key] = kinds[key](value.replace(";", ","))
        except ValueError:
            raise ConfigError(f"tenant: {value!r} is no number, in {text!r}") from None
    return TenantMix(name=name, **values)


def _cost_from(given: Mapping[str, Any]) -> "CostModel | None":
    """None is the roofline."""
    from mini_vllm.simulator.cost import TwoConstantCost
    from mini_vllm.simulator.fitted import FittedCost

    constants = [name for name in ("step_ms", "token_us") if name in given]
    implied = "fitted" if "cost_file" in given else "two-constant" if constants else "roofline"
    kind = given.get("cost_model", implied)
    wrong = (["cost_file"] if "cost_file" in given and kind != "fitted" else []) + (
        constants if kind != "two-constant" else []
    )
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: no meaning with the cost model {kind!r}")
    if kind == "two-constant":
        return TwoConstantCost(given.get("step_ms", 0.0) / 1e3, given.get("token_us", 0.0) / 1e6)
    if kind == "fitted":
        if "cost_file" not in given:
            raise ConfigError("cost_file: the cost model 'fitted' needs the file that simulate --calibrate wrote")
        return FittedCost.load(given["cost_file"])
    return None


def _chosen(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in given.items() if name in names}


def _sizes(given: Mapping[str, Any], *names: str) -> dict[str, int]:
    return {name: parse_size(name, given[name]) for name in names if name in given}
