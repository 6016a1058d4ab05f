"""Layers are finished while a checkpoint is read: each exactly once, when it is whole, and its plain weight goes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mini_vllm.config import LoadConfig, ModelConfig
from mini_vllm.exceptions import CheckpointError
from mini_vllm.hf_config import HFConfig
from mini_vllm.layers.linear import LinearBase
from mini_vllm.models.finishing import LayerFinisher, release_weights
from mini_vllm.models.llama import LlamaForCausalLM
from mini_vllm.models.loader import load_model
from mini_vllm.models.safetensors_reader import LazyTensor
from mini_vllm.models.utils import weight_bytes
from mini_vllm.ops import linear as ops
from mini_vllm.quantization.unquantized import UnquantizedLinearMethod
from tests.checkpoints import make_checkpoint


def load(folder: Path, load_format: Any = "auto", dtype: str = "float32") -> nn.Module:
    config = ModelConfig(str(folder), HFConfig.from_folder(folder), dtype, None)
    return load_model(config, LoadConfig(load_format, use_tqdm=False), torch.device("cpu"))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Reading and finishing in the order they happen; what is packed is a plain copy, on every machine."""
    seen: list[str] = []
    narrow, process = LazyTensor.narrow, UnquantizedLinearMethod.process_weights_after_loading

    def record_narrow(self: LazyTensor, *args: int) -> torch.Tensor:
        seen.append(f"read {self.name}")
        return narrow(self, *args)

    def record_process(self: UnquantizedLinearMethod, layer: nn.Module) -> None:
        seen.append(f"finish {layer.prefix}")
        process(self, layer)

    monkeypatch.setattr(LazyTensor, "narrow", record_narrow)
    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", record_process)
    monkeypatch.setattr(ops, "native_linear", lambda weight: None)
    monkeypatch.setattr(ops, "prepack", lambda weight: weight.detach().clone())
    monkeypatch.setattr(ops, "packed_linear", torch.nn.functional.linear)
    return seen


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_each_layer_is_finished_once_as_soon_as_its_last_part_is_there(
    tmp_path: Path, events: list[str], num_shards: int, tied: bool
) -> None:
    folder = make_checkpoint(
        tmp_path, tokenizer=False, num_shards=num_shards, attention_bias=True, tie_word_embeddings=tied
    )
    model = load(folder)
    parts = {
        "qkv_proj": [f"{x}_proj.{leaf}" for x in "qkv" for leaf in ("weight", "bias")],
        "o_proj": ["o_proj.weight", "o_proj.bias"],
        "gate_up_proj": ["gate_proj.weight", "up_proj.weight"],
        "down_proj": ["down_proj.weight"],
    }
    layers = [module.prefix for module in model.modules() if isinstance(module, LinearBase)]
    assert len(layers) == 8
    for prefix in layers:
        home, _, name = prefix.rpartition(".")
        last = max(events.index(f"read {home}.{part}") for part in parts[name])
        assert events.count(f"finish {prefix}") == 1
        assert events.index(f"finish {prefix}") == last + 1, "not at the end, not before it is whole"
    assert events.count("finish lm_head") == 1
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert events[events.index("finish lm_head") - 1] == f"read {head}"


def test_the_plain_weight_of_a_finished_layer_is_freed_while_others_still_come(
    tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, tokenizer=False)
    alive: list[int] = []
    params: list[nn.Parameter] = []
    init, finish = LayerFinisher.__init__, LayerFinisher._finish

    def record_init(self: LayerFinisher, model: nn.Module) -> None:
        init(self, model)
        params.extend(model.parameters())

    def record_finish(self: LayerFinisher, layer: nn.Module) -> None:
        finish(self, layer)
        alive.append(sum(param.numel() for param in params))

    monkeypatch.setattr(LayerFinisher, "__init__", record_init)
    monkeypatch.setattr(LayerFinisher, "_finish", record_finish)
    model = load(folder)
    assert alive == sorted(alive, reverse=True) and len(set(alive)) == len(alive) - 1  # the embedding stays plain
    plain = [name for name, param in model.named_parameters() if param.dim() == 2]
    assert plain == ["model.embed_tokens.weight"]
    assert alive[-1] == sum(param.numel() for param in model.parameters())


def test_a_tied_matrix_stays_for_the_embedding_when_the_head_is_packed(tmp_path: Path, events: list[str]) -> None:
    model = load(make_checkpoint(tmp_path, tokenizer=False, tie_word_embeddings=True))
    assert isinstance(model, LlamaForCausalLM)
    assert model.lm_head.weight is None and model.lm_head.packed_weight is not None
    assert model.lm_head.packed_weight.equal(model.model.embed_tokens.weight)


def test_layers_that_nothing_was_read_for_are_finished_too(tmp_path: Path, events: list[str]) -> None:
    folder = make_checkpoint(tmp_path, tokenizer=False)
    model = load(folder, load_format="dummy")
    finished = [event for event in events if event.startswith("finish ")]
    assert len(finished) == len(set(finished)) == 9
    assert all(module.weight is None for module in model.modules() if isinstance(module, LinearBase))


def test_loaders_are_what_they_were_after_loading(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, tokenizer=False))
    for module in model.modules():
        for param in module.parameters(recurse=False):
            assert "load_and_report" not in repr(getattr(param, "weight_loader", None))


def test_a_model_that_failed_to_load_holds_no_memory_though_its_error_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, tokenizer=False, num_shards=2)
    assert weight_bytes(load(folder)) > 0, "broken control"
    made: list[nn.Module] = []
    init = LlamaForCausalLM.__init__

    def record(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", record)
    for file in folder.glob("model*"):
        file.write_bytes(file.read_bytes().replace(b"model.norm.weight", b"model.norn.weight"))
    with pytest.raises(CheckpointError, match="missing: model.norm.weight; unexpected: model.norn.weight") as error:
        load(folder)
    assert weight_bytes(made[-1]) == 0 and error.value is not None


def test_releasing_takes_packed_weights_as_well(tmp_path: Path, events: list[str]) -> None:
    model = load(make_checkpoint(tmp_path, tokenizer=False))
    assert weight_bytes(model) > 0
    release_weights(model)
    assert weight_bytes(model) == 0
