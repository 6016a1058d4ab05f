"""A family's checkpoint beside transformers' model of it, and how far our logits are from theirs.

transformers chooses the frequencies of length-dependent rope scalings by the longest sequence of each call; the
engine chooses once, by `max_model_len`. So every call of theirs here is exactly `max_model_len` tokens long: sequences
are filled up at the end, which no earlier token of a causal model can see.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from mini_vllm.config import LoadConfig, ModelConfig
from mini_vllm.hf_config import HFConfig
from mini_vllm.models.loader import load_model
from tests.families import VOCAB_SIZE, Family
from tests.paged import PagedDriver

TOLERANCE = 2e-4
BROKEN = 0.2
"""What every control must exceed: a thousand times the tolerance."""
NEAR_TIE = 1e-4
"""Where the highest logits are nearer than this, greedy tokens may differ: both sides are that far from exact."""
NUM_GREEDY = 32
FILLER = 5
ONE_SHOT = (range(10**9),)


@dataclasses.dataclass
class Oracle:
    """One family: its checkpoint, prompts of mixed length, transformers' logits for each."""

    family: Family
    folder: Path
    config: HFConfig
    hf_model: torch.nn.Module
    prompts: list[list[int]]
    logits: list[torch.Tensor]

    @classmethod
    def make(cls, family: Family, folder: Path) -> "Oracle":
        family.write(folder)
        hf_model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
        limit = family.max_model_len
        generator = torch.Generator().manual_seed(7)
        lengths = (limit - NUM_GREEDY, 1, 16, 17, limit - 1)
        prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]
        oracle = cls(family, folder, HFConfig.from_folder(folder), hf_model, prompts, [])
        oracle.logits = oracle.their_logits(prompts)
        return oracle

    @torch.inference_mode()
    def their_logits(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """[length, vocab] for each sequence."""
        limit = self.family.max_model_len
        rows = [[*sequence, *[FILLER] * (limit - len(sequence))] for sequence in sequences]
        logits = self.hf_model(torch.tensor(rows), use_cache=False).logits
        return [row[: len(sequence)] for row, sequence in zip(logits, sequences, strict=True)]

    def their_greedy(self, prompts: Sequence[Sequence[int]], steps: int = NUM_GREEDY) -> list[list[int]]:
        """Greedy tokens without any cache: nothing to get wrong."""
        sequences = [list(prompt) for prompt in prompts]
        for _ in range(steps):
            for sequence, logits in zip(sequences, self.their_logits(sequences), strict=True):
                sequence.append(int(logits[-1].argmax()))
        return [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]

    def differ(self, prompt: Sequence[int], tokens: Sequence[int], expected: Sequence[int]) -> bool:
        """Whether tokens differ from their greedy ones otherwise than from a near-tie on."""
        if len(tokens) != len(expected):
            return True
        for index, (token, their_token) in enumerate(zip(tokens, expected, strict=True)):
            if token != their_token:
                logits = self.their_logits([[*prompt, *expected[:index]]])[0][-1]
                return bool(logits[their_token] - logits[token] > NEAR_TIE)
        return False

    def model(
        self, max_model_len: int | None = None, *, dtype: str = "float32", **config_changes: object
    ) -> torch.nn.Module:
        """Ours, from the same checkpoint, perhaps with another config."""
        config = dataclasses.replace(self.config, **config_changes)
        limit = self.family.max_model_len if max_model_len is None else max_model_len
        model_config = ModelConfig(str(self.folder), config, dtype, limit)
        return load_model(model_config, LoadConfig(use_tqdm=False), torch.device("cpu"))

    def error(self, model: torch.nn.Module, spans: Sequence[range] = ONE_SHOT) -> float:
        """Largest distance of any logit, each span of positions of all prompts being one flat batch."""
        return float(self._distances(model, spans).max())

    def mean_error(self, model: torch.nn.Module, spans: Sequence[range] = ONE_SHOT) -> float:
        """Mean distance of all logits."""
        return float(self._distances(model, spans).mean())

    def _distances(self, model: torch.nn.Module, spans: Sequence[range]) -> torch.Tensor:
        driver = PagedDriver(model)
        outputs: list[list[torch.Tensor]] = [[] for _ in self.prompts]
        for span in spans:
            batch = [(i, p[span.start : span.stop]) for i, p in enumerate(self.prompts) if p[span.start : span.stop]]
            for (i, _), logits in zip(batch, driver.step(batch) if batch else [], strict=True):
                outputs[i].append(logits)
        return (torch.cat([torch.cat(parts) for parts in outputs]) - torch.cat(self.logits)).abs()
