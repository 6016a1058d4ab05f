"""transformers' `generate` with scaled-dot-product attention. Widths: bf16, f32.

Batches are static: left-padded, and run to the longest; tokens beyond what a request asked for are not counted."""

import os

from worker_protocol import Generate, arguments, serve

os.environ["HF_HUB_OFFLINE"] = "1"
args = arguments(__doc__ or "")


def start() -> tuple[Generate, str, dict[str, object]]:
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[args.width]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: list[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        most = max(tokens)
        made = model.generate(
            ids, attention_mask=mask, do_sample=False, min_new_tokens=most, max_new_tokens=most,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return [row[:count] for row, count in zip(made[:, longest:].tolist(), tokens, strict=True)]

    return generate, transformers.__version__, {"torch": torch.__version__, "batching": "static"}


serve(start)
