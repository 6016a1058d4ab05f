"""Claims about every family that GGUF files may hold: logits are those of the same checkpoint in safetensors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mini_vllm.config import LoadConfig, ModelConfig
from mini_vllm.gguf.config import gguf_hf_config
from mini_vllm.gguf.families import FAMILIES as GGUF_FAMILIES
from mini_vllm.gguf.reader import open_gguf
from mini_vllm.gguf.weights import checkpoint_tensors
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
    "gemma2": "query_pre_attn_scalar, which follows from the sizes in published models",
    "gemma2-all-windows-biased": "layer_types",
    "gemma3-rope-linear": "query_pre_attn_scalar",
    "gemma3-new-spelling": "layer_types",
    "gpt2-untied-scores-by-layer": "scale_attn_by_inverse_layer_idx",
}
"""Rows of tests/families.py that a GGUF file cannot say, with what it has no key for."""
NOT_READ = {"opt": "no such architecture in the format", "llama4_text": "published with experts alone"}


GEMMA = {"head_dim": 24, "tie_word_embeddings": True, "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"}
OWN_ROWS = (
    Family(
        "gemma2-as-published",
        {
            "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **GEMMA, "sliding_window": 12,
            "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
        },
        norm_mean=0.0,
    ),
    Family(
        "gemma3-as-published",
        {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **GEMMA, "sliding_window": 12,
            "query_pre_attn_scalar": 24, "num_hidden_layers": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        norm_mean=0.0,
    ),
)  # fmt: skip
ROWS = (*FAMILIES, *OWN_ROWS)


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


@pytest.mark.parametrize("family", [row for row in ROWS if in_gguf(row)], ids=lambda family: family.name)
def test_a_family_gives_the_logits_of_its_checkpoint(family: Family, tmp_path: Path) -> None:
    ours, theirs = both(family, tmp_path)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


STORED_DIFFERENTLY = ("llama", "mistral-window", "gemma2-as-published", "gemma3-as-published")


@pytest.mark.parametrize("family", [row for row in ROWS if row.name in STORED_DIFFERENTLY], ids=lambda row: row.name)
def test_numbers_that_are_stored_differently_must_be_turned_back(family: Family, tmp_path: Path) -> None:
    """Broken control: the same file without what its converter does to numbers."""
    ours, theirs = both(family, tmp_path, permute=False)
    assert not torch.allclose(ours, theirs, atol=0.1)


def test_every_row_of_the_table_is_served_and_tested() -> None:
    tested = {str(family.config["model_type"]) for family in ROWS if in_gguf(family)}
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


ALSO_READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "phi3-window", "stablelm", "gemma2-as-published",
                             "gemma3-as-published", "gpt2")  # fmt: skip


@pytest.mark.parametrize("family", [row for row in ROWS if row.name in ALSO_READ_BY_TRANSFORMERS], ids=lambda r: r.name)
def test_transformers_finds_the_same_numbers_under_the_same_names(family: Family, tmp_path: Path) -> None:
    """The writer of these tests follows the conventions that others read by."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    checkpoint = family.write(tmp_path / "model")
    file = write_gguf(checkpoint, tmp_path / "x.gguf")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    theirs = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    ours = {tensor.name: tensor.read(0, tensor.shape[0]) for tensor in checkpoint_tensors(open_gguf(file))}
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, np.asarray(theirs[name]), err_msg=name)
