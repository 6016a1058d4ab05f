"""Train the bundled model from scratch, on the CPU, in about an hour.

The defaults are what was run for the shipped weights. A run is defined by its
flags and the corpus alone: which tokens a step sees is a function of (seed,
step), so a run that was stopped and resumed sees the same data as one that was
not. Muon updates the matrices inside the layers, AdamW the tied embedding and
the norms; the learning rate warms up, stays, and falls linearly to zero over
the last part, where the rows also become longer. The corpus is small (about two
million tokens), so the run reads it a dozen times; dropout begins after the
first epochs, when the loss on seen text starts to leave that on unseen text.

State lives in `--run-dir`: `checkpoint.pt` (replaced atomically; found again
without asking), `log.jsonl`, and, while it exists, `PAUSE`, a file that makes
the trainer stop computing until it is removed. SIGTERM and SIGINT save a
checkpoint and leave. At each checkpoint the weights are also written to
`--out`, so there is a loadable model from the first minutes on.

    training/launch.sh        # this script, in the background, with the lowest priority
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

# Threads that spin at a barrier waste the core another process was given.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from corpus import Document, load_corpus, split_corpus
from model import Llama, ModelConfig

HERE = Path(__file__).resolve().parent
BOS_ID = 0
GENERATION_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.95,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    default_out = HERE.parent / "mini_vllm" / "assets" / "stdlib-llama-3.7m"
    add("--out", type=Path, default=default_out, help="model folder; must hold tokenizer.json")
    add("--run-dir", type=Path, default=HERE / "run", help="checkpoint, log and PAUSE file")
    add("--seed", type=int, default=20261120, help="seed of weights and data order")
    add("--tokens", type=int, default=24_000_000, help="training tokens in all")
    add("--batch-tokens", type=int, default=8192, help="tokens per optimizer step")
    add("--micro-tokens", type=int, default=8192, help="tokens per forward and backward pass")
    add("--seq-len", type=int, default=512, help="row length in the first part")
    add("--long-seq-len", type=int, default=1024, help="row length in the last part")
    add("--long-fraction", type=float, default=0.15, help="part of the tokens seen in long rows")
    add("--warmup-tokens", type=int, default=480_000, help="tokens with a rising rate")
    add("--decay-fraction", type=float, default=0.30, help="part of the tokens with a falling rate")
    add("--muon-lr", type=float, default=0.02, help="peak rate of the layer matrices")
    add("--adam-lr", type=float, default=0.004, help="peak rate of embedding and norms")
    add("--weight-decay", type=float, default=0.05, help="decoupled weight decay of the matrices")
    add("--dropout", type=float, default=0.1, help="dropout on each residual contribution")
    add("--dropout-from", type=int, default=9_265_152, help="tokens before the dropout begins")
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="autocast type")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    add("--threads", type=int, default=2, help="torch threads")
    add("--log-every", type=int, default=10, help="steps between log lines")
    add("--eval-every", type=int, default=150, help="steps between held-out losses")
    add("--save-minutes", type=float, default=3.0, help="minutes between checkpoints")
    add("--stop-after", type=int, default=0, help="leave after this many steps (0: never); for timing")
    return parser.parse_args()


def tokenize(tokenizer: Tokenizer, documents: list[Document]) -> np.ndarray:
    """Return all documents as one stream of ids, each after its separator."""
    encodings = tokenizer.encode_batch([d.text for d in documents])
    return np.concatenate([np.asarray(e.ids, dtype=np.int64) for e in encodings])


@lru_cache(maxsize=2)
def epoch_offsets(seed: int, seq_len: int, epoch: int, num_tokens: int) -> np.ndarray:
    """Return the shuffled row starts of one epoch; each epoch cuts the stream elsewhere."""
    rng = np.random.default_rng((seed, seq_len, epoch))
    starts = np.arange(rng.integers(seq_len), num_tokens - seq_len, seq_len)
    return rng.permutation(starts[: num_tokens // seq_len - 1])


def row(stream: np.ndarray, seed: int, seq_len: int, index: int) -> np.ndarray:
    """Return row `index`: BOS and the next `seq_len` tokens from its start.

    Every row begins with BOS, wherever in a document it was cut, because every
    prompt the model will ever see does.
    """
    epoch, position = divmod(index, len(stream) // seq_len - 1)
    start = int(epoch_offsets(seed, seq_len, epoch, len(stream))[position])
    return np.concatenate(([BOS_ID], stream[start : start + seq_len]))


def step_batch(stream: np.ndarray, args: argparse.Namespace, step: int) -> Tensor:
    """Return the rows of one step, [rows, seq_len + 1]; a function of (seed, step) alone."""
    seq_len = seq_len_at(args, step)
    rows = args.batch_tokens // seq_len
    picked = [row(stream, args.seed, seq_len, step * rows + i) for i in range(rows)]
    return torch.from_numpy(np.stack(picked))


def total_steps(args: argparse.Namespace) -> int:
    return args.tokens // args.batch_tokens


def seq_len_at(args: argparse.Namespace, step: int) -> int:
    is_long = step >= (1 - args.long_fraction) * total_steps(args)
    return args.long_seq_len if is_long else args.seq_len


def lr_scale(args: argparse.Namespace, step: int) -> float:
    """Warm-up, stable, linear decay to zero (WSD), as a factor of the peak rate."""
    steps = total_steps(args)
    warm = (step + 1) * args.batch_tokens / max(1, args.warmup_tokens)
    falling = (steps - step) / max(1.0, args.decay_fraction * steps)
    return min(1.0, warm, falling)


def build_optimizers(model: Llama, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the 2-D weights inside the layers, AdamW for the rest."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    embedding = model.model.embed_tokens.weight
    groups = [
        {"params": [embedding], "weight_decay": args.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=args.weight_decay, momentum=0.95),
        torch.optim.AdamW(groups, lr=args.adam_lr, betas=(0.9, 0.95), eps=1e-10),
    ]


def autocast(args: argparse.Namespace) -> torch.autocast | nullcontext:
    return torch.autocast("cpu", torch.bfloat16) if args.precision == "bf16" else nullcontext()


def micro_batches(batch: Tensor, micro_tokens: int) -> Iterator[Tensor]:
    rows = max(1, micro_tokens // (batch.shape[1] - 1))
    yield from batch.split(rows)


class Trainer:
    """The state of a run: model, optimizers, position, log."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        torch.set_num_threads(args.threads)
        self.args = args
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        train, held_out = split_corpus(load_corpus())
        self.stream = tokenize(tokenizer, train)
        self.held_out = tokenize(tokenizer, held_out)
        self.held_out_bytes = sum(d.num_bytes for d in held_out)
        self.model = Llama(ModelConfig())
        self.loss = torch.compile(self.model.loss, dynamic=False) if args.compile else self.model.loss
        self.optimizers = build_optimizers(self.model, args)
        self.step, self.wall_s = 0, 0.0
        self.stop = False

    # -- state ---------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, then the loadable weights; both replaced atomically."""
        state = {
            "step": self.step,
            "wall_s": self.wall_s,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        part = self.args.run_dir / "checkpoint.pt.part"
        torch.save(state, part)
        os.replace(part, self.args.run_dir / "checkpoint.pt")
        export(self.model, self.args.out)

    def resume(self) -> None:
        """Continue from the checkpoint of the run folder, if there is one."""
        path = self.args.run_dir / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.step, self.wall_s = state["step"], state["wall_s"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.log(event="resume")

    def log(self, **fields: object) -> None:
        line = {"step": self.step, "tokens": self.step * self.args.batch_tokens, **fields}
        with (self.args.run_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # -- work ----------------------------------------------------------------

    def seed_dropout(self) -> None:
        """Drop nothing while the text is new; then masks that depend on (seed, step) alone."""
        torch.manual_seed(self.args.seed + self.step)
        repeated = self.step * self.args.batch_tokens >= self.args.dropout_from
        for layer in self.model.model.layers:
            layer.dropout = self.args.dropout if repeated else 0.0

    def train_step(self) -> float:
        """Do one optimizer step and return its mean loss in nats per token."""
        self.seed_dropout()
        batch = step_batch(self.stream, self.args, self.step)
        total = 0.0
        for rows in micro_batches(batch, self.args.micro_tokens):
            with autocast(self.args):
                loss = self.loss(rows[:, :-1], rows[:, 1:]) * (len(rows) / len(batch))
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        scale = lr_scale(self.args, self.step)
        for optimizer, peak in zip(self.optimizers, (self.args.muon_lr, self.args.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the held-out loss in nats per token, in rows like those of training."""
        self.model.eval()
        length = self.args.seq_len
        usable = len(self.held_out) // length * length
        targets = torch.from_numpy(self.held_out[:usable]).view(-1, length)
        inputs = torch.cat((torch.full((len(targets), 1), BOS_ID), targets[:, :-1]), dim=1)
        total = 0.0
        for x, y in zip(inputs.split(16), targets.split(16), strict=True):
            with autocast(self.args):
                total += self.model.loss(x, y, reduction="sum").item()
        self.model.train()
        return total / usable

    def log_held_out(self) -> None:
        loss = self.held_out_loss()
        bits = loss * len(self.held_out) / self.held_out_bytes / math.log(2)
        self.log(held_out_loss=round(loss, 4), held_out_bits_per_byte=round(bits, 4))

    def wait_while_paused(self) -> None:
        while (self.args.run_dir / "PAUSE").exists() and not self.stop:
            time.sleep(1)

    def run(self) -> None:
        """Train to the end of the token budget, or until told to stop."""
        last_step = self.args.stop_after or total_steps(self.args)
        last_save, window_s, losses = time.monotonic(), 0.0, []
        while self.step < last_step and not self.stop:
            self.wait_while_paused()
            begin = time.monotonic()
            losses.append(self.train_step())
            self.wall_s += time.monotonic() - begin
            window_s += time.monotonic() - begin
            if self.step % self.args.log_every == 0:
                self.log_progress(losses, window_s)
                window_s, losses = 0.0, []
            if self.step % self.args.eval_every == 0:
                self.log_held_out()
            if time.monotonic() - last_save > 60 * self.args.save_minutes:
                self.save()
                last_save = time.monotonic()

    def log_progress(self, losses: list[float], seconds: float) -> None:
        self.log(
            loss=round(sum(losses) / len(losses), 4),
            lr=round(self.args.muon_lr * lr_scale(self.args, self.step - 1), 6),
            seq_len=seq_len_at(self.args, self.step - 1),
            tok_s=round(len(losses) * self.args.batch_tokens / seconds),
            wall_s=round(self.wall_s, 1),
        )


def export(model: Llama, folder: Path) -> None:
    """Write weights (bfloat16) and configs; readers see the old or the new file, never half."""
    weights = {name: t.detach().to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()}
    part = folder / ".model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.chmod(0o644)  # safetensors makes private files; these are package data
    os.replace(part, folder / "model.safetensors")
    for name, content in (
        ("config.json", model.cfg.to_hf()),
        ("generation_config.json", GENERATION_CONFIG),
    ):
        part = folder / f".{name}.part"
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(part, folder / name)


def publish_log(source: Path, target: Path, keep_every: int = 50) -> None:
    """Copy the log to the model folder without most of its step lines."""
    lines = source.read_text(encoding="utf-8").splitlines()
    kept = [x for x in lines if "lr" not in (line := json.loads(x)) or line["step"] % keep_every == 0]
    target.write_text("\n".join(kept) + "\n", encoding="utf-8")


def main() -> None:
    args = parse_args()
    args.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(trainer, "stop", True))
    trainer.resume()
    flags = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    trainer.log(event="start", flags=flags)
    trainer.run()
    trainer.save()
    trainer.log_held_out()
    trainer.log(event="stopped" if trainer.stop else "finished", wall_s=round(trainer.wall_s, 1))
    publish_log(args.run_dir / "log.jsonl", args.out / "training_log.jsonl")


if __name__ == "__main__":
    main()
