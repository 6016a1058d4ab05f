"""The plan's sections about sizes: the model, memory, concurrency, and what splitting, adapters and drafts cost."""

from mini_vllm.simulator.planner import lora, parallel, speculation
from mini_vllm.simulator.planner.geometry import WEIGHT_DTYPE_BYTES, KVLayers
from mini_vllm.simulator.planner.memory import blocks_for
from mini_vllm.simulator.planner.plan import Line, Section
from mini_vllm.simulator.planner.setup import Setup
from mini_vllm.worker.kv_cache import gib


def model_section(s: Setup) -> Section:
    model, parts = s.model, s.model.parameters
    lines = [
        Line("num_parameters", "parameters", model.num_parameters, "", _sum_of(parts.as_dict())),
        Line("layers", "layers", model.num_layers, "", f"hidden {model.hidden_size}, MLP {model.intermediate_size}"),
        Line("attention", "attention", model.kv_kind, "", _attention_text(s)),
    ]
    if model.is_moe:
        text = f"all but experts, and {model.experts_per_token} of {model.num_experts} in {model.num_moe_layers} layers"
        lines.insert(1, Line("active_parameters", "active per token", model.active_parameters, "", text))
    for layers in model.kv_layers:
        lines.append(_kv_line(s, layers))
    lines.append(Line("kv_bytes_per_token", "KV cache per token", s.kv_bytes_per_token, "B", _kv_total_text(s)))
    return Section("model", "Model", tuple(lines))


def _sum_of(parts: dict[str, int]) -> str:
    return " + ".join(f"{name} {value:,}" for name, value in parts.items())


def _attention_text(s: Setup) -> str:
    m = s.model
    return f"{m.num_heads} query heads, {m.num_kv_heads} KV heads of {m.head_dim}"


def _kv_line(s: Setup, layers: KVLayers) -> Line:
    size = s.kv_dtype_bytes
    key, name = f"kv_{layers.kind}", layers.kind.replace("_", " ")
    if layers.kind == "mamba":
        value = round(layers.num_layers * layers.state_elements * size)
        text = f"{layers.num_layers} layers x {layers.state_elements:,} numbers x {size:g} B per sequence, however long"
        return Line(key, f"state of {layers.num_layers} {name} layers", value, "B", text)
    value = round(layers.num_layers * layers.elements_per_token * size)
    if layers.kind == "mla":
        text = f"{layers.num_layers} layers x (latent + rotary key = {layers.elements_per_token}) x {size:g} B"
    else:
        text = f"2 x {layers.num_layers} layers x {s.model.num_kv_heads} KV heads x {s.model.head_dim} x {size:g} B"
    if layers.window is not None:
        text += f", of the last {layers.window:,} tokens only"
    return Line(key, f"KV of {layers.num_layers} {name} layers, per token", value, "B", text)


def _kv_total_text(s: Setup) -> str:
    o, text = s.options, f"all kinds, {s.kv_dtype}"
    if o.tensor_parallel_size * o.pipeline_parallel_size > 1:
        text += f"; per device of tensor_parallel_size {o.tensor_parallel_size}"
        text += f" x pipeline_parallel_size {o.pipeline_parallel_size}"
    return text


def memory_section(s: Setup) -> Section:
    o = s.options
    lines = [
        Line("memory", "memory", s.hardware.memory_bytes, "B", s.hardware.source),
        Line("model_bytes", "weights, whole model", s.model_bytes, "B", _weights_text(s)),
        Line("weight_bytes", "weights, per device", s.weight_bytes, "B", _share_text(s)),
        Line("activation_bytes", "activations and logits", s.activation_bytes, "B", _activation_text(s)),
    ]
    if s.lora_bytes:
        lines.append(Line("lora_bytes", "LoRA slots", s.lora_bytes, "B", f"{o.max_loras} x rank {o.max_lora_rank}"))
    pool = s.num_blocks * s.block_bytes
    lines += [
        Line("kv_cache_bytes", "KV cache", pool, "B", _budget_text(s)),
        Line("headroom_bytes", "left unused", _headroom(s, pool), "B", "memory - everything above"),
        Line("block_bytes", "per block", s.block_bytes, "B",
             f"{o.block_size} tokens x {s.kv_bytes_per_token:,} B"),
        Line("num_gpu_blocks", "blocks", s.num_blocks, "blocks",
             f"{gib(pool)} // {s.block_bytes:,} B; one is the null block"),
        Line("kv_cache_tokens", "tokens", (s.num_blocks - 1) * o.block_size, "tokens",
             f"({s.num_blocks:,} - 1) x {o.block_size}"),
    ]  # fmt: skip
    lines += _engine_lines(s)
    return Section("memory", "Memory of one device", tuple(lines))


def _headroom(s: Setup, pool: int) -> int:
    return s.hardware.memory_bytes - s.weight_bytes - s.activation_bytes - s.lora_bytes - pool


def _weights_text(s: Setup) -> str:
    if s.options.weight_bytes is not None:
        return "given"
    if s.quant is None:
        copy = s.hardware.packs_weights and not s.model.parameters.lm_head
        text = f"{s.model.num_parameters:,} x {WEIGHT_DTYPE_BYTES[s.dtype]} B ({s.dtype})"
        return text + ("; the tied embedding twice, once packed" if copy else "")
    head = "" if s.quant.head_bits is None else f", {s.quant.head_bits:.4g} in the output matrix"
    where = "all weights" if s.quant.whole_model else f"matrices{head}; embeddings and norms stay {s.dtype}"
    return f"{s.quant.name}: {s.quant.bits:.4g} bits in {where}"


def _share_text(s: Setup) -> str:
    split, stages = s.split, s.options.pipeline_parallel_size
    if split.size * stages == 1:
        return "all of them"
    text = f"{split.replicated_parameters:,} on every rank + the rest / {split.size}"
    return text if stages == 1 else f"({text}) / {stages} stages"


def _activation_text(s: Setup) -> str:
    o = s.options
    if o.activation_bytes is not None:
        return "given"
    logits = f"{o.max_num_seqs} x {s.model.vocab_size:,}"
    return f"a step of {o.max_num_batched_tokens:,} tokens and logits of {logits}, generous"


def _budget_text(s: Setup) -> str:
    o = s.options
    if o.num_gpu_blocks_override is not None:
        return f"num_gpu_blocks_override {o.num_gpu_blocks_override}"
    if o.kv_cache_memory_bytes is not None:
        return "kv_cache_memory_bytes, in whole blocks"
    taken = f"{gib(s.weight_bytes)} - {gib(s.activation_bytes)}" + (f" - {gib(s.lora_bytes)}" if s.lora_bytes else "")
    return f"{gib(s.hardware.memory_bytes)} x {o.gpu_memory_utilization} - {taken}, in whole blocks"


def _engine_lines(s: Setup) -> list[Line]:
    """What this engine would do with the same arguments, where it can: its own function, its own groups."""
    o = s.options
    if not s.runs_in_engine or o.tensor_parallel_size * o.pipeline_parallel_size > 1:
        return []
    blocks, why = s.engine_num_blocks()
    per_request = blocks_for(s.context, o.block_size) * len(s.engine_groups)
    text = "our own rule, which serve follows (the lines above are vLLM's): " + why
    text += ", weights and activations taken off before the share" if "utilization" in why else ""
    lines = [Line("engine_num_gpu_blocks", "blocks in mini-vllm", blocks, "blocks", text)]
    if len(s.engine_groups) > 1:
        text = (
            f"({blocks:,} - 1) / ({len(s.engine_groups)} groups x {blocks_for(s.context, o.block_size):,} blocks): it"
        )
        text += " masks windows, but keeps their blocks"
        value = max(0, blocks - 1) / per_request
        lines.append(Line("engine_max_concurrency", "concurrency in mini-vllm", value, "x", text))
    return lines


def concurrency_section(s: Setup) -> Section:
    o, one = s.options, s.sequence_bytes(s.context)
    exact = s.model.kv_bytes_per_sequence(s.context, s.kv_dtype, o.tensor_parallel_size) // o.pipeline_parallel_size
    pool = s.num_blocks * s.block_bytes
    tail = blocks_for(s.context, o.block_size) * o.block_size - s.context
    lines = [
        Line("context", "context", s.context, "tokens", "tokens each sequence holds"),
        Line("kv_bytes_per_sequence", "KV cache per sequence", exact, "B", _sequence_text(s)),
        Line("sequences_by_bytes", "sequences by bytes alone", pool // exact, "sequences",
             f"{gib(pool)} // {gib(exact)}"),
        Line("max_concurrency", "maximum concurrency", s.max_concurrency, "x",
             f"({s.num_blocks:,} - 1) blocks / {one / s.block_bytes:,.6g} blocks a sequence"),
        Line("max_seqs", "sequences at once", int(min(s.max_concurrency, o.max_num_seqs)), "sequences",
             f"whole ones, at most max_num_seqs {o.max_num_seqs}"),
        Line("tail_waste", "empty slots of the last block", tail, "tokens",
             f"of {s.context:,} tokens in blocks of {o.block_size}; at most {o.block_size - 1}"),
    ]  # fmt: skip
    if o.shared_prefix_tokens:
        lines.append(_shared_line(s))
    return Section("concurrency", "Concurrency", tuple(lines))


def _sequence_text(s: Setup) -> str:
    if s.model.is_hybrid or s.model.kv_layers[0].window is not None:
        return f"each kind at {s.context:,} tokens, windows at their length"
    return f"{s.context:,} x {s.kv_bytes_per_token:,} B"


def _shared_line(s: Setup) -> Line:
    o = s.options
    shared = min(o.shared_prefix_tokens, s.context - 1) // o.block_size
    own = blocks_for(s.context, o.block_size) - shared
    value = (s.num_blocks - 1 - shared) / own
    text = f"({s.num_blocks:,} - 1 - {shared:,} shared blocks) / {own:,} own blocks"
    return Line("max_concurrency_shared", "the same with a shared prefix", value, "x", text)


def tensor_parallel_section(s: Setup) -> Section:
    o, split, link = s.options, s.split, s.hardware.link
    width = WEIGHT_DTYPE_BYTES[s.dtype]
    payload = parallel.allreduce_payload_bytes(s.batch, s.model.hidden_size, width)
    layers, hidden, size = s.model.num_layers, s.model.hidden_size, split.size
    bandwidth, latency = link.bytes_per_second, link.latency_seconds
    decode = parallel.tp_comm_seconds_per_step(layers, s.batch, hidden, size, bandwidth, latency, width)
    chunk = min(s.prompt_len, o.max_num_batched_tokens)
    prefill = parallel.tp_comm_seconds_per_step(layers, chunk, hidden, size, bandwidth, latency, width)
    compute = s.steps.decode(s.batch, s.context).seconds
    copied = ", copied since there are fewer than ranks" if split.kv_heads_replicated else ""
    wire = f"2 x {size - 1}/{size} x payload / {bandwidth / 1e9:g} GB/s + {2 * (size - 1)} x {latency * 1e6:g} us"
    ring = f"2 x {layers} layers x ({wire})"
    lines = (
        Line("tp_heads", "query heads per rank", split.heads, "", f"{s.model.num_heads} / {size}"),
        Line("tp_kv_heads", "KV heads per rank", split.kv_heads, "", f"{s.model.num_kv_heads} / {size}{copied}"),
        Line("tp_payload_bytes", "payload of one all-reduce", payload, "B", f"{s.batch} rows x {hidden} x {width} B"),
        Line("tp_all_reduces", "all-reduces per step", 2 * layers, "", f"2 x {layers} layers"),
        Line("tp_decode_comm", "communication, decode step", decode, "s", f"{ring} over {link.name}"),
        Line("tp_decode_share", "share of the decode step", 100 * parallel.comm_fraction(decode, compute), "%",
             f"without overlap, beside {compute * 1e3:.3g} ms"),
        Line("tp_prefill_comm", "communication, prefill step", prefill, "s", f"the same with {chunk:,} rows"),
    )  # fmt: skip
    return Section("tensor_parallel", f"Tensor parallel over {size} devices", lines)


def pipeline_section(s: Setup) -> Section:
    o, link = s.options, s.hardware.link
    stages, width = o.pipeline_parallel_size, WEIGHT_DTYPE_BYTES[s.dtype]
    need = parallel.min_microbatches_for_bubble(stages, o.max_bubble)
    in_flight = max(1, min(s.batch, need))
    rows = max(1, s.batch // in_flight)
    handoff = parallel.pipeline_handoff_seconds(
        stages, rows, s.model.hidden_size, link.bytes_per_second, link.latency_seconds, width
    )
    bubble = parallel.bubble_fraction(stages, in_flight)
    share = -(-s.batch // stages)
    lap = s.steps.decode(share, s.context).seconds + handoff
    lines = (
        Line("pp_bubble_alone", "bubble of one batch", 100 * parallel.bubble_fraction(stages, 1), "%",
             f"({stages} - 1) / ({stages} + 1 - 1)"),
        Line("pp_min_microbatches", f"microbatches for a bubble of {o.max_bubble:.0%}", need, "",
             f"least m with ({stages} - 1) / ({stages} + m - 1) <= {o.max_bubble}"),
        Line("pp_bubble", f"bubble with {in_flight} in flight", 100 * bubble, "%",
             f"({stages} - 1) / ({stages} + {in_flight} - 1); {s.batch} sequences to cut up"),
        Line("pp_handoff", "hand-overs per step", handoff, "s",
             f"{stages - 1} x ({rows} rows x {s.model.hidden_size} x {width} B over {link.name} + one hop)"),
        Line("pp_tokens_per_second", f"throughput with {stages} groups of {share}", s.batch / lap, "tok/s",
             f"{s.batch} / a lap of one group ({lap * 1e3:.4g} ms): every stage is busy with another group"),
    )  # fmt: skip
    return Section("pipeline", f"Pipeline of {stages} stages", lines)


def disaggregation_section(s: Setup) -> Section:
    o = s.options
    assert o.kv_transfer_gbps is not None
    whole = s.model.kv_bytes_per_sequence(s.prompt_len, s.kv_dtype)
    transfer = parallel.transfer_seconds(whole, o.kv_transfer_gbps)
    visible = parallel.visible_transfer_seconds(transfer, o.kv_transfer_overlap)
    steps = s.steps.prefill(s.prompt_len, s.prefill_chunk)
    prefill, chunk = sum(step.seconds for step in steps), max(step.seconds for step in steps)
    decode = s.steps.decode(s.batch, s.context).seconds
    worst = parallel.colocated_itl_worst(decode, chunk)
    wins = parallel.disagg_wins(decode, chunk, visible, prefill)
    lines = (
        Line("pd_payload_bytes", "KV cache to ship", whole, "B", f"of a prompt of {s.prompt_len:,} tokens"),
        Line("pd_transfer", "transfer", transfer, "s", f"{gib(whole)} x 8 bits / {o.kv_transfer_gbps:g} Gbit/s"),
        Line("pd_visible", "of it visible", visible, "s", f"transfer x (1 - overlap {o.kv_transfer_overlap:g})"),
        Line("pd_ttft_penalty", "toll on TTFT", 100 * visible / prefill, "%",
             f"visible / prefill {prefill * 1e3:.4g} ms"),
        Line("pd_itl_colocated", "worst gap, both on one machine", worst, "s",
             f"decode step {decode * 1e3:.3g} ms + chunk {chunk * 1e3:.3g} ms"),
        Line("pd_itl_gain", "gap shrinks by", worst / decode, "x", "(decode step + chunk) / decode step"),
        Line("pd_worth_it", "worth it", "yes" if wins else "no", "", "gap at least 1.5x shorter, toll at most 25 %"),
    )  # fmt: skip
    return Section("disaggregation", "Prefill and decode on machines of their own", lines)


def lora_section(s: Setup) -> Section:
    o, width = s.options, WEIGHT_DTYPE_BYTES[s.dtype]
    targets = lora.target_linears(s.model, o.lora_target_modules)
    params = lora.model_adapter_params(s.model, o.max_lora_rank, o.lora_target_modules)
    base = s.model.num_layers * sum(linear.in_features * linear.out_features for linear in targets)
    names = ", ".join(linear.name for linear in targets)
    slots = lora.slot_reservation_bytes(s.model, o.max_loras, o.max_lora_rank, width, o.lora_target_modules)
    lines = (
        Line("lora_adapter_bytes", "one adapter", params * width, "B",
             f"rank {o.max_lora_rank} x (in + out) of {names} x {s.model.num_layers} layers x {width} B"),
        Line("lora_slot_bytes", "all slots, all devices", slots, "B", f"max_loras {o.max_loras} of the largest rank"),
        Line("lora_blocks_lost", "KV cache blocks they cost, per device", -(-s.lora_bytes // s.block_bytes), "blocks",
             f"{gib(s.lora_bytes)} / {s.block_bytes:,} B"),
        Line("lora_adapters_per_gib", "adapters per GiB", 2**30 // (params * width), "", "2^30 // one adapter"),
        Line("lora_shrink_ratio", "model to adapter", s.model.num_parameters / params, "x", f"{params:,} parameters"),
        Line("lora_flop_overhead", "extra arithmetic of adapted rows", 100 * params / base, "%",
             "adapter parameters / parameters of the matrices adapted"),
    )  # fmt: skip
    return Section("lora", f"LoRA, {o.max_loras} slots of rank {o.max_lora_rank}", lines)


def speculation_section(s: Setup) -> Section:
    o = s.options
    alpha, k, cost = o.acceptance_rate, o.num_speculative_tokens, o.draft_cost
    best = speculation.optimal_k(alpha, cost)
    one, many = s.steps.decode(s.batch, s.context), s.steps.step([(max(0, s.context - 1 - k), k + 1)] * s.batch)
    growth = max(0.0, many.seconds / one.seconds - 1) / k
    lines = (
        Line("spec_tokens_per_step", "tokens per verification", speculation.expected_tokens_per_verify(alpha, k), "",
             f"(1 - {alpha:g}^{k + 1}) / (1 - {alpha:g})" if alpha < 1 else f"{k} + 1"),
        Line("spec_speedup", "speed-up at batch 1", speculation.speedup(alpha, k, cost), "x",
             f"tokens / ({k} x draft cost {cost:g} + 1)"),
        Line("spec_ceiling", "with free drafts without end", speculation.ceiling(alpha), "x", f"1 / (1 - {alpha:g})"),
        Line("spec_optimal_k", "best number of drafts", best, "",
             f"speed-up {speculation.speedup(alpha, best, cost):.4g}; pays when acceptance {alpha:g} > cost {cost:g}"),
        Line("spec_verify_growth", "dearer verification per draft", 100 * growth, "%",
             f"roofline of {s.batch} x {k + 1} tokens against {s.batch} x 1"),
        Line("spec_speedup_at_batch", "speed-up at this batch", speculation.speedup(alpha, k, cost, growth), "x",
             "tokens / (drafts x (cost + growth) + 1)"),
    )  # fmt: skip
    return Section("speculation", f"Speculation with {k} drafts", lines)
