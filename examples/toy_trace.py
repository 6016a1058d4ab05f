"""Watch the scheduler share a budget of 8 tokens a step between two prompts. Needs numpy only.

    python examples/toy_trace.py
    python examples/toy_trace.py --budget 24 "first prompt" "second prompt" "third"
    python examples/toy_trace.py --num-blocks 5 --block-size 4 --budget 64 abcdefgh ijklmnop

One row a step and one column a request: how many tokens it was given, and what it sampled once its prompt was
computed. Below a step: who had to give way, and why each waiting request waits.
"""

import argparse
import string

from mini_vllm import SamplingParams
from mini_vllm.exceptions import MiniVLLMError
from mini_vllm.toy import TOY_MODELS, ToyEngine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trace the scheduler on a toy model, step by step.")
    parser.add_argument("prompts", nargs="*", default=["hello world", "goodbye"])
    parser.add_argument("--budget", type=int, default=8, help="tokens a step (max_num_batched_tokens)")
    parser.add_argument("--max-tokens", type=int, default=4)
    parser.add_argument("--threshold", type=int, default=0, help="long_prefill_token_threshold; 0 is off")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--num-blocks", type=int, default=256, help="KV cache blocks, null block included")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--model", choices=sorted(TOY_MODELS), default="toy")
    return parser.parse_args()


def cell(num_scheduled: int, sampled: str) -> str:
    """'8' for a chunk of a prompt, "3 -> 'x'" for a step that also sampled, '.' for nothing."""
    if not num_scheduled:
        return "."
    return f"{num_scheduled} -> {sampled!r}" if sampled else str(num_scheduled)


def trace(engine: ToyEngine, names: dict[str, str]) -> None:
    """Step to the end and print a row a step."""
    print("step  tokens  " + "  ".join(f"{name:<10}" for name in names.values()) + "  KV in use")
    while engine.has_unfinished_requests():
        before = {rid: engine.requests[rid].num_output_tokens for rid in names}
        engine.step()
        record = engine.engine_core.trace.last(1)[0]
        cells = []
        for rid in names:
            sampled = engine.tokenizer.decode(engine.requests[rid].output_token_ids[before[rid] :])
            cells.append(f"{cell(record.num_scheduled_tokens.get(rid, 0), sampled):<10}")
        total = record.total_num_scheduled_tokens
        print(f"{record.step_id:>4}  {total:>6}  {'  '.join(cells)}  {record.kv_cache_usage:>9.1%}")
        for rid in record.preempted_req_ids:
            print(f"        {names[rid]} was preempted: its blocks are freed, its output is kept")
        for rid, reason in engine.scheduler.waiting_reasons().items():
            print(f"        {names[rid]} waits: {reason}")
        for rid, reason in record.finished.items():
            error = engine.requests[rid].error
            print(f"        {names[rid]} is done ({reason}{': ' + error if error else ''})")


def name_of(index: int) -> str:
    return string.ascii_uppercase[index] if index < 26 else f"R{index}"


def main() -> None:
    args = parse_args()
    engine = ToyEngine(
        num_blocks=args.num_blocks,
        block_size=args.block_size,
        max_num_batched_tokens=args.budget,
        long_prefill_token_threshold=args.threshold,
        max_num_seqs=args.max_num_seqs,
        model=args.model,
    )
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
    try:
        names = {engine.add_request(prompt, params): name_of(i) for i, prompt in enumerate(args.prompts)}
    except MiniVLLMError as error:
        raise SystemExit(f"refused: {error}") from None
    print(f"budget {args.budget} tokens a step, {args.max_tokens} tokens to generate")
    for (rid, name), prompt in zip(names.items(), args.prompts, strict=True):
        print(f"{name} = {prompt!r}, {engine.requests[rid].num_prompt_tokens} tokens")
    print()
    trace(engine, names)
    print()
    for rid, name in names.items():
        request = engine.requests[rid]
        print(f"{name}: {engine.tokenizer.decode(request.output_token_ids)!r} ({request.finish_reason})")


if __name__ == "__main__":
    main()
