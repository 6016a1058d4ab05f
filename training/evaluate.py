"""Score the bundled model on the held-out files, beside compressors and a 3-gram model.

Everything is in bits per byte of held-out text, which does not depend on the
tokenizer. The saved (bfloat16) weights are scored in float32 twice, with our
`model.py` and with `transformers`, and the logits of the two are compared. Each
document is cut into windows that start with BOS, as in training; all but the
first give half their length as context only.

    python training/evaluate.py
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from corpus import Document, load_corpus, split_corpus
from model import load_model
from ngram import TrigramModel
from train import BOS_ID, HERE, tokenize

PROMPTS = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\ndef main():\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    '    def read(self, size=-1):\n        """',
    "The with statement is used to",
    "for i in range(",
)
Logits = Callable[[Tensor], Tensor]


def windows(ids: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (inputs, targets) of `length`; targets that do not count are -100."""
    stride = length // 2
    for start in range(0, max(1, len(ids) - stride), stride):
        targets = np.full(length, -100)
        piece = ids[start : start + length]
        targets[: len(piece)] = piece
        inputs = np.concatenate(([BOS_ID], np.maximum(targets[:-1], 0)))
        if start:
            targets[:stride] = -100
        yield inputs, targets


@torch.no_grad()
def model_nats(logits: Logits, documents: list[np.ndarray], length: int) -> float:
    """Return the code length of all documents under a model, in nats."""
    total = 0.0
    for ids in documents:
        for x, y in windows(ids, length):
            out = logits(torch.from_numpy(x)[None])[0]
            total += F.cross_entropy(out, torch.from_numpy(y), reduction="sum").item()
    return total


def document_ids(tokenizer: Tokenizer, documents: list[Document]) -> list[np.ndarray]:
    return [tokenize(tokenizer, [d])[1:] for d in documents]


def compressed_bits(train: bytes, held_out: bytes) -> dict[str, float]:
    """Return bits per held-out byte of compressors; the last one has read the training split."""

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    scale = 8 / len(held_out)
    return {
        "gzip -9": scale * len(gzip.compress(held_out, 9)),
        "xz -9e": scale * xz(held_out),
        "xz -9e, after the training split": scale * (xz(train + held_out) - xz(train)),
    }


def trigram_bits(tokenizer: Tokenizer, train: list[Document], held_out: list[np.ndarray], size: int) -> float:
    trigram = TrigramModel(tokenize(tokenizer, train), tokenizer.get_vocab_size())
    nats = sum(trigram.nats(np.concatenate(([BOS_ID], ids))) for ids in held_out)
    return nats / math.log(2) / size


@torch.no_grad()
def logits_difference(ours: Logits, theirs: Logits, ids: np.ndarray) -> float:
    """Return the largest absolute difference of two models' logits on one row."""
    row = torch.from_numpy(np.concatenate(([BOS_ID], ids)))[None]
    return float((ours(row) - theirs(row)).abs().max())


def sample_continuations(folder: Path, model: Any, new_tokens: int) -> dict[str, str]:
    """Return greedy continuations, made with `transformers` alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, temperature=None, top_p=None)
        samples[prompt] = str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
    return samples


def evaluate(folder: Path, length: int, new_tokens: int) -> dict[str, Any]:
    """Return all results as one JSON-ready object."""
    train, held_out = split_corpus(load_corpus())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    held_out_ids, size = document_ids(tokenizer, held_out), sum(d.num_bytes for d in held_out)
    seen = train[::25]
    seen_size = sum(d.num_bytes for d in seen)

    def bits(logits: Logits, documents: list[np.ndarray], num_bytes: int) -> float:
        return model_nats(logits, documents, length) / math.log(2) / num_bytes

    def their_logits(ids: Tensor) -> Tensor:
        return theirs(ids).logits

    texts = ("".join(d.text for d in part).encode("utf-8") for part in (train, held_out))
    return {
        "held_out": {"files": len(held_out), "bytes": size, "tokens": sum(map(len, held_out_ids))},
        "bits_per_byte": {
            **compressed_bits(*texts),
            "3-gram, modified Kneser-Ney": trigram_bits(tokenizer, train, held_out_ids, size),
            "this model": bits(ours, held_out_ids, size),
            "this model, in transformers": bits(their_logits, held_out_ids, size),
            "this model, on training files": bits(ours, document_ids(tokenizer, seen), seen_size),
        },
        "max_logits_difference_to_transformers": logits_difference(
            ours, their_logits, max(held_out_ids, key=len)[: length - 1]
        ),
        "greedy_continuations": sample_continuations(folder, theirs, new_tokens),
    }


def markdown_table(bits_per_byte: dict[str, float]) -> str:
    rows = [f"| {name} | {value:.3f} |" for name, value in bits_per_byte.items()]
    return "\n".join(["| held-out text | bits per byte |", "|---|---:|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = HERE.parent / "mini_vllm" / "assets" / "stdlib-llama-3.7m"
    parser.add_argument("--model", type=Path, default=default, help="model folder")
    parser.add_argument("--out", type=Path, default=HERE / "run" / "evaluation.json", help="JSON to write")
    parser.add_argument("--length", type=int, default=1024, help="window length in tokens")
    parser.add_argument("--new-tokens", type=int, default=120, help="length of the sample continuations")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = evaluate(args.model, args.length, args.new_tokens)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(markdown_table(results["bits_per_byte"]))
    print("largest logits difference:", results["max_logits_difference_to_transformers"])
    for prompt, text in results["greedy_continuations"].items():
        print(f"\n=== {prompt!r}\n{prompt}{text}")


if __name__ == "__main__":
    main()
