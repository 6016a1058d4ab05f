"""Claims about every family that GGUF files may hold: logits are those of the same checkpoint in safetensors."""

import json
from pathlib import Path

import pytest
import torch

from mini_vllm.config import LoadConfig, ModelConfig
from mini_vllm.gguf.config import gguf_hf_config
from mini_vllm.gguf.families import FAMILIES as GGUF_FAMILIES
from mini_vllm.gguf.reader import open_gguf
from mini_vllm.hf_config import HFConfig
from mini_vllm.models.loader import load_model
from mini_vllm.models.registry import ModelRegistry
from tests.families import FAMILIES, Family
from tests.gguf.writer import ARCHITECTURES, write_gguf
from tests.paged import PagedDriver

TOKENS = [(7 * i + 3) % 120 for i in range(40)]

NOT_IN_THE_FORMAT = {
    "llama-rope-dynamic-within": "no such scaling",
    "llama-rope-dynamic-beyond": "no such scaling",
    "llama-rope-yarn-options": "mscale and truncate",
    "qwen2-window-tied": "a window in some layers",
    "qwen3-window-tied-biased": "a window in some layers",
}
"""Rows of tests/families.py that a GGUF file cannot say, with what it has no key for."""
NOT_READ = {"opt": "llama.cpp has no such architecture"}


def in_gguf(family: Family) -> bool:
    return family.name not in NOT_IN_THE_FORMAT and family.config["model_type"] not in NOT_READ


def logits(model_config: ModelConfig, load_format: str) -> torch.Tensor:
    model = load_model(model_config, LoadConfig(load_format, use_tqdm=False), torch.device("cpu"))  # type: ignore[arg-type]
    return PagedDriver(model).step([(0, TOKENS)])[0]


def both(family: Family, folder: Path, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of the GGUF file, logits of the safetensors checkpoint)."""
    checkpoint = family.write(folder / "model", seed=1)
    file = write_gguf(checkpoint, folder / "x.gguf", **options)  # type: ignore[arg-type]
    from_gguf = ModelConfig(str(file), gguf_hf_config(open_gguf(file)), "float32", family.max_model_len)
    from_folder = ModelConfig(str(checkpoint), HFConfig.from_folder(checkpoint), "float32", family.max_model_len)
    return logits(from_gguf, "gguf"), logits(from_folder, "auto")


@pytest.mark.parametrize("family", filter(in_gguf, FAMILIES), ids=lambda family: family.name)
def test_a_family_gives_the_logits_of_its_checkpoint(family: Family, tmp_path: Path) -> None:
    ours, theirs = both(family, tmp_path)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


STORED_DIFFERENTLY = ("llama", "mistral-window", "gemma2", "gemma3", "gpt2")


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in STORED_DIFFERENTLY], ids=lambda family: family.name
)
def test_numbers_that_are_stored_differently_must_be_turned_back(family: Family, tmp_path: Path) -> None:
    """Broken control: the same file without what its converter does to numbers."""
    if family.config["model_type"] == "gpt2":
        pytest.skip("its shapes would not fit")
    ours, theirs = both(family, tmp_path, permute=False)
    assert not torch.allclose(ours, theirs, atol=0.1)


def test_every_row_of_the_table_is_served_and_tested() -> None:
    tested = {str(family.config["model_type"]) for family in FAMILIES if in_gguf(family)}
    assert {ARCHITECTURES.get(name, name) for name in tested} == set(GGUF_FAMILIES)
    assert {family.architecture for family in GGUF_FAMILIES.values()} <= set(ModelRegistry.supported_architectures())


def test_rows_that_are_left_out_exist() -> None:
    names = {family.name for family in FAMILIES}
    assert set(NOT_IN_THE_FORMAT) <= names


@pytest.mark.parametrize("name", ["llama", "mistral-window", "phi3-longrope-beyond", "stablelm"])
def test_the_config_says_what_config_json_said(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    checkpoint = family.write(tmp_path / "model")
    ours = gguf_hf_config(open_gguf(write_gguf(checkpoint, tmp_path / "x.gguf")))
    theirs = HFConfig.from_dict(json.loads((checkpoint / "config.json").read_text()))
    different = {
        key
        for key in HFConfig.__dataclass_fields__
        if key not in ("raw", "rope", "bos_token_id", "eos_token_ids") and getattr(ours, key) != getattr(theirs, key)
    }
    assert not different
    assert ours.rope.theta == theirs.rope.theta and ours.rope.partial_rotary_factor == theirs.rope.partial_rotary_factor
