"""What quantising weights or the KV cache costs: KL divergence and perplexity beside the same model unquantised.

Text: files of this repository's `docs/` (prose) and `benchmarks/` (code), which are no part of the bundled model's
corpus, or `--text FILE`. For every position KL(p || q) of the next-token distributions, p from plain bfloat16 weights;
the mean, the worst percentile, how often the best token is the same, and the perplexity of the text.

Where the `gguf` package is installed, the same matrices rounded to llama.cpp's Q8_0 and Q4_0 stand beside ours. Only
weights are rounded there: its engine also rounds activations, to 8 bits in groups of 32, which would add to it.

    python benchmarks/quantization_quality.py [--model DIR] [--dtype bfloat16] [--tokens 1024] [--json FILE]
"""

import argparse
import json
import math
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mini_vllm import LLM, SamplingParams
from mini_vllm.engine.arg_utils import EngineArgs

ROOT = Path(__file__).resolve().parent.parent
VARIANTS: list[dict[str, Any]] = [
    {"quantization": "int8"},
    {"quantization": "int8", "quantization_activation_scales": "group"},
    {"quantization": "int8_per_channel_weight_only"},
    {"quantization": "int4"},
    {"quantization": "int4", "quantization_activation_scales": "group"},
    {"quantization": "int4", "quantization_lm_head": "same"},
    {"quantization": "int4", "quantization_symmetric": False},
    {"quantization": "int4", "quantization_group_size": 64},
    {"quantization": "int4", "quantization_group_size": 128},
    {"kv_cache_dtype": "int8_per_token_head"},
    {"kv_cache_dtype": "float16"},
    {"quantization": "int8", "kv_cache_dtype": "int8_per_token_head"},
    *([{"gguf": "Q8_0"}, {"gguf": "Q4_0"}] if find_spec("gguf") else []),
]


def chunks_of(text: str, args: argparse.Namespace) -> list[list[int]]:
    """Token ids of the text in pieces that fit the model, `args.tokens` in all."""
    ids = EngineArgs(model=args.model).load_tokenizer().encode(text)[: args.tokens]
    return [list(ids[start : start + args.chunk]) for start in range(0, len(ids), args.chunk)]


def log_probs(chunks: list[list[int]], args: argparse.Namespace, **options: Any) -> torch.Tensor:
    """[positions, vocabulary]: the distribution of every token of the chunks but their first."""
    if kind := options.pop("gguf", None):
        with tempfile.TemporaryDirectory() as folder:
            rounded = argparse.Namespace(**vars(args) | {"model": round_as_gguf(args.model, kind, Path(folder))})
            return log_probs(chunks, rounded)
    llm = LLM(args.model, dtype=args.dtype, max_logprobs=-1, disable_log_stats=True, **options)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1)
    outputs = llm.generate([{"prompt_token_ids": chunk} for chunk in chunks], params, use_tqdm=False)
    rows = [at for output in outputs for at in output.prompt_logprobs[1:]]
    table = torch.empty(len(rows), len(rows[0]))
    for i, row in enumerate(rows):
        table[i, torch.tensor(list(row))] = torch.tensor([entry.logprob for entry in row.values()])
    return table


def round_as_gguf(model: str | None, kind: str, folder: Path) -> str:
    """A copy of the checkpoint in `folder` whose matrices are what `kind` makes of them; the head is in Q8_0."""
    import gguf
    from safetensors.torch import load_file, save_file

    source = EngineArgs(model=model).model_source.path
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: x for file in source.glob("*.safetensors") for name, x in load_file(file).items()}
    for name, x in tensors.items():
        if x.dim() == 2:
            wanted = gguf.GGMLQuantizationType["Q8_0" if "embed" in name or "lm_head" in name else kind]
            rounded = gguf.quants.dequantize(gguf.quants.quantize(x.float().numpy(), wanted), wanted)
            tensors[name] = torch.from_numpy(rounded).to(x.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def compare(plain: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    kl = torch.where(plain > -math.inf, plain.exp() * (plain - other), 0.0).sum(1)
    perplexity = [(-table.gather(1, targets[:, None])).mean().exp().item() for table in (plain, other)]
    return {
        "kl_mean": kl.mean().item(),
        "kl_99": kl.quantile(0.99).item(),
        "same_best": (plain.argmax(1) == other.argmax(1)).float().mean().item(),
        "perplexity": perplexity[1],
        "perplexity_plain": perplexity[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of quantised weights.")
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--only", default=None, help="variants that set this option, such as kv_cache_dtype")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    files = [args.text] if args.text else sorted(ROOT.glob("benchmarks/*.py")) + sorted(ROOT.glob("docs/*.md"))
    chunks = chunks_of("\n".join(path.read_text(encoding="utf-8") for path in files), args)
    targets = torch.tensor([token for chunk in chunks for token in chunk[1:]])
    plain = log_probs(chunks, args)
    results = []
    print(f"{len(targets)} positions, {args.dtype}")
    print(f"{'options':62} {'KL mean':>9} {'KL 99%':>9} {'same best':>9} {'perplexity':>10}")
    for options in ({}, *(v for v in VARIANTS if not args.only or args.only in v)):
        found = compare(plain, log_probs(chunks, args, **options) if options else plain, targets)
        results.append({"options": options, **found})
        name = " ".join(f"{key.removeprefix('quantization_')}={value}" for key, value in options.items()) or "plain"
        print(
            f"{name:62} {found['kl_mean']:9.5f} {found['kl_99']:9.5f} {found['same_best']:9.4f} "
            f"{found['perplexity']:10.3f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
