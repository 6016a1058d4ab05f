"""Checkpoints that are damaged or lie, given to `LLM`: a typed error that names what is wrong, and nothing left behind.

What the loader alone can be asked is in test_loader.py and test_safetensors_reader.py; here the whole engine starts.
"""

import gc
import json
import re
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mini_vllm import LLM, SamplingParams
from mini_vllm.exceptions import CheckpointError, KVCacheTooSmallError, MiniVLLMError, UnsupportedModelError
from mini_vllm.models.llama import LlamaForCausalLM
from mini_vllm.models.utils import weight_bytes
from tests.checkpoints import make_checkpoint

SHARDS = tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
INDEX = "model.safetensors.index.json"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
Damage = Callable[[Path], None]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sound"), num_shards=3)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "model")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Every model that an engine began to build."""
    models: list[nn.Module] = []
    init = LlamaForCausalLM.__init__

    def record(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        models.append(self)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", record)
    return models


def start(folder: Path, **kwargs: Any) -> LLM:
    return LLM(str(folder), **{"dtype": "float32", "num_threads": 1, "num_gpu_blocks_override": 20} | kwargs)


def tokens(llm: LLM, prompts: Any = "hello") -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def edit_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def edit_index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        for shard in SHARDS:
            tensors = load_file(folder / shard)
            if name in tensors:
                save_file(tensors | {name: change(tensors[name]).contiguous()}, folder / shard)

    return damage


def cut(shard: str, size: int) -> Damage:
    return lambda folder: (folder / shard).write_bytes((folder / shard).read_bytes()[:size]) and None


def swap(folder: Path) -> None:
    (folder / SHARDS[0]).rename(folder / "x")
    (folder / SHARDS[1]).rename(folder / SHARDS[0])
    (folder / "x").rename(folder / SHARDS[1])


def link_outside(folder: Path) -> None:
    (folder / SHARDS[1]).rename(folder.parent / "elsewhere.safetensors")
    (folder / SHARDS[1]).symlink_to(folder.parent / "elsewhere.safetensors")


def repeat_a_tensor(folder: Path) -> None:
    other = load_file(folder / SHARDS[1])
    name = sorted(other)[0]
    save_file(load_file(folder / SHARDS[0]) | {name: other[name]}, folder / SHARDS[0])


def claim_a_huge_header(folder: Path) -> None:
    data = bytearray((folder / SHARDS[0]).read_bytes())
    data[:8] = (2**62).to_bytes(8, "little")
    (folder / SHARDS[0]).write_bytes(data)


def flip_header(folder: Path) -> None:
    data = bytearray((folder / SHARDS[0]).read_bytes())
    data[9] ^= 0x80
    (folder / SHARDS[0]).write_bytes(data)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (cut(SHARDS[2], -7), f"{SHARDS[2]}: not a whole safetensors file"),
    "of zero bytes": (cut(SHARDS[1], 0), f"{SHARDS[1]}: not a whole safetensors file"),
    "header cut off": (cut(SHARDS[1], 20), f"{SHARDS[1]}: not a whole safetensors file"),
    "header corrupt": (flip_header, f"{SHARDS[0]}: not a whole safetensors file"),
    "header of 4 EiB": (claim_a_huge_header, f"{SHARDS[0]}: not a whole safetensors file"),
    "shard absent": (lambda folder: (folder / SHARDS[1]).unlink(), f"{INDEX}: '{SHARDS[1]}' cannot be found"),
    "index names an absent file": (
        edit_index(lambda m: m.update({K_PROJ: "gone.safetensors"})), f"{INDEX}: 'gone.safetensors' cannot be found",
    ),
    "index names a path outside": (
        edit_index(lambda m: m.update({K_PROJ: "../x.safetensors"})), f"{INDEX}: '../x.safetensors' must be a",
    ),
    "index names a tensor too many": (
        edit_index(lambda m: m.update({"ghost": SHARDS[0]})), f"{SHARDS[0]}: does not hold what {INDEX} says: ghost",
    ),
    "link out of the folder": (link_outside, f"{INDEX}: '{SHARDS[1]}' leads outside"),
    "shards swapped": (swap, f"{SHARDS[0]}: does not hold what {INDEX} says: .*model"),
    "a tensor in two shards": (repeat_a_tensor, f"{SHARDS[0]}: does not hold what {INDEX} says: .*model"),
    "shape": (edit_tensor(K_PROJ, lambda t: t[:-1]), rf"tensor {K_PROJ} has shape \[31, 64\], expected \[32, 64\]"),
    "transposed": (edit_tensor(K_PROJ, lambda t: t.T), rf"tensor {K_PROJ} has shape \[64, 32\], expected \[32, 64\]"),
    "one dimension more": (edit_tensor(K_PROJ, lambda t: t[None]), rf"tensor {K_PROJ} has shape \[1, 32, 64\]"),
    "integers": (edit_tensor(K_PROJ, lambda t: t.to(torch.int8)), f"tensor {K_PROJ} is stored as I8, not as floats"),
    "eight-bit floats": (
        edit_tensor(K_PROJ, lambda t: t.to(torch.float8_e4m3fn)), f"tensor {K_PROJ} is stored as F8_E4M3, not as",
    ),
    "a layer more in the config": (
        edit_config(num_hidden_layers=3), r"missing: model\.layers\.2\..* and 1 more$",
    ),
    "a layer less in the config": (
        edit_config(num_hidden_layers=1), r"do not fit LlamaForCausalLM: unexpected: model\.layers\.1\..* and 1 more",
    ),
    "no layers in the config": (edit_config(num_hidden_layers=0), r"config\.json: num_hidden_layers must be an int"),
    "vocabulary larger": (
        edit_config(vocab_size=400), r"embed_tokens\.weight has shape \[384, 64\], expected \[400, 64\]",
    ),
    "vocabulary smaller": (
        edit_config(vocab_size=383), r"embed_tokens\.weight has shape \[384, 64\], expected \[383, 64\]",
    ),
    "heads that do not divide": (
        edit_config(num_attention_heads=5), r"config\.json: .*(num_key_value_heads|hidden_size).*num_attention_heads 5",
    ),
    "key heads that do not divide": (
        edit_config(num_key_value_heads=3), r"config\.json: num_key_value_heads 3 must divide num_attention_heads 4",
    ),
    "more key heads": (edit_config(num_key_value_heads=4), r"k_proj\.weight has shape \[32, 64\], expected \[64, 64\]"),
    "hidden size": (edit_config(hidden_size=128), r"has shape \[.*64\], expected \[.*128\]|has shape \[64\], expected"),
    "tied though two matrices differ": (
        edit_config(tie_word_embeddings=True), r"differs from .*, but config\.json ties them",
    ),
    "biases that are not there": (edit_config(attention_bias=True), r"missing: .*proj\.bias"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_an_error_that_names_it_and_the_repaired_folder_starts(
    sound: Path, folder: Path, made: list[nn.Module], kind: str
) -> None:
    damage, named = DAMAGES[kind]
    damage(folder)
    with pytest.raises(CheckpointError, match=named) as error:
        start(folder)
    assert error.value.__traceback__ is not None, "the error, with all frames, is kept while these are counted:"
    assert [weight_bytes(model) for model in made] == [0] * len(made)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("read-weights")]
    shutil.rmtree(folder)
    shutil.copytree(sound, folder)
    assert len(tokens(start(folder))[0]) == 4
    assert weight_bytes(made[-1]) > 0, "broken control"


def test_a_pool_that_is_too_small_leaves_no_weights_behind(folder: Path, made: list[nn.Module]) -> None:
    with pytest.raises(KVCacheTooSmallError) as error:
        start(folder, num_gpu_blocks_override=2, max_model_len=256)
    assert error.value is not None and [weight_bytes(model) for model in made] == [0]
    assert tokens(start(folder, num_gpu_blocks_override=20, max_model_len=256))


def test_bad_defaults_beside_sound_weights_leave_none_behind(folder: Path, made: list[nn.Module]) -> None:
    for name, value in (("temperature", -3), ("eos_token_id", ["</s>"])):
        (folder / "generation_config.json").write_text(json.dumps({name: value}))
        with pytest.raises(MiniVLLMError, match=name) as error:
            start(folder)
        models = [weakref.ref(model) for model in made]
        made.clear()
        gc.collect()
        assert error.value is not None and [model() for model in models] == [None] * len(models)
    (folder / "generation_config.json").unlink()
    assert tokens(start(folder))


def test_an_interrupt_while_loading_leaves_nothing_behind(
    folder: Path, made: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mini_vllm.models.safetensors_reader import LazyTensor

    narrow, count = LazyTensor.narrow, iter(range(100))

    def interrupted(self: LazyTensor, *args: int) -> torch.Tensor:
        if next(count) == 7:
            raise KeyboardInterrupt
        return narrow(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LazyTensor, "narrow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(folder)
    assert [weight_bytes(model) for model in made] == [0]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("read-weights")]
    assert tokens(start(folder))


def test_an_architecture_nobody_serves_is_told_from_damage(folder: Path) -> None:
    edit_config(architectures=["Unheard"])(folder)
    with pytest.raises(UnsupportedModelError, match="Unheard"):
        start(folder)


# --- what loads and shows when it runs ----------------------------------------------------------------------


def test_weights_of_nan_load_and_fail_the_requests_that_meet_them_alone(sound: Path, folder: Path) -> None:
    expected = tokens(start(sound), [{"prompt_token_ids": [1, 20, 21]}])
    row = 77

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor[row] = torch.nan
        return tensor

    edit_tensor("model.embed_tokens.weight", poison)(folder)
    llm = start(folder, num_gpu_blocks_override=4, max_model_len=48, enable_prefix_caching=False)
    prompts: list[Any] = [{"prompt_token_ids": [1, 20, 21]}, {"prompt_token_ids": [1, row, 21]}]
    good, bad = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error" and re.search("logits allow no token", bad.error or "")
    assert [list(good.outputs[0].token_ids)] == expected and good.outputs[0].finish_reason == "length"
    for _ in range(4):  # blocks that held NaN are used again
        assert tokens(llm, prompts[:1]) == expected


def test_a_whole_matrix_of_nan_fails_every_request_and_the_engine_lives(folder: Path) -> None:
    edit_tensor("lm_head.weight", lambda t: torch.full_like(t, torch.nan))(folder)
    llm = start(folder)
    for _ in range(2):
        outputs = llm.generate(["hello", "again"], GREEDY, use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error"]
