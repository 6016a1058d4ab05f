"""mini_vllm through `LLM.generate`. Widths: bf16, f32, int8, int8-weights (activations as they are), int4 (8-bit head),
int4-head (4-bit head too). Behind one, `-eager` turns the captured step off, `-avx2` and `-portable` take the kernels
of lesser processors."""

import os

from worker_protocol import Generate, arguments, serve, split_width

args = arguments(__doc__ or "")
WIDTH, VARIANT = split_width(args.width)
os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
if VARIANT not in ("", "eager"):
    os.environ["MINI_VLLM_CPU_ISA"] = VARIANT
QUANTIZED = {
    "int8": {"quantization": "int8"},
    "int8-weights": {"quantization": "int8_per_channel_weight_only"},
    "int4": {"quantization": "int4"},
    "int4-head": {"quantization": "int4", "quantization_lm_head": "int4"},
}


def start() -> tuple[Generate, str, dict[str, object]]:
    from mini_vllm import LLM, SamplingParams, __version__
    from mini_vllm.ops.cpu import library

    options = dict(QUANTIZED.get(WIDTH, {}))
    if VARIANT == "eager":
        options["enforce_eager"] = True
    llm = LLM(
        args.model,
        dtype="float32" if WIDTH == "f32" else "bfloat16",
        max_model_len=args.max_len,
        max_num_seqs=args.max_seqs,
        max_num_batched_tokens=args.step_tokens,
        num_gpu_blocks_override=args.kv_tokens // 16 + 2 * args.max_seqs,
        num_threads=args.threads,
        enable_prefix_caching=False,
        use_tqdm_on_load=False,
        **options,
    )

    def generate(prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in tokens]
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, __version__, {"kernels": library.loaded_isa(), **options}


serve(start)
