"""Claims about weights out of GGUF files: logits are those of the same numbers in safetensors."""

import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.exceptions import CheckpointError, ConfigError, UnsupportedModelError
from mini_vllm.gguf.quants import dequantize, quant_type
from mini_vllm.gguf.reader import open_gguf
from mini_vllm.gguf.weights import checkpoint_tensors, describe_types
from mini_vllm.models import gguf_loader
from mini_vllm.models.gguf_loader import GGUFWeight, iterate_gguf_weights
from mini_vllm.models.loader import load_model
from tests.checkpoints import make_checkpoint
from tests.gguf.blocks import DECODERS, decode, random_blocks
from tests.gguf.writer import deinterleave, dequantised_copy, load_arrays, matrices_as, write_gguf
from tests.paged import PagedDriver

TOKENS = [3, 77, 12, 100, 5, 9, 41, 8, 120, 64, 2, 30]


def load(path: Path, dtype: str = "float32", **kwargs: object) -> torch.nn.Module:
    config = EngineArgs(model=str(path), dtype=dtype, **kwargs).create_engine_config()
    return load_model(config.model, config.load, torch.device("cpu"))


def logits(path: Path, dtype: str = "float32") -> torch.Tensor:
    return PagedDriver(load(path, dtype)).step([(0, TOKENS)])[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", seed=3)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen2"), "qwen2", seed=4, tie_word_embeddings=True)


# --- float types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_float32_gives_the_very_logits_of_safetensors(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    assert logits(write_gguf(folder, tmp_path / "x.gguf")).equal(logits(folder))


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32, "num_kv_heads": 1},
        {"tie_word_embeddings": True, "rope_theta": 500000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"vocab_size": 500},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_of_a_llama_survives_the_format(options: dict[str, object], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", seed=5, **options)
    assert logits(write_gguf(folder, tmp_path / "x.gguf")).equal(logits(folder))


def test_rows_left_in_rotary_pairs_give_other_logits(llama: Path, tmp_path: Path) -> None:
    """Broken control: the file of a converter that forgot to interleave, and one whose reader would not undo it."""
    file = write_gguf(llama, tmp_path / "x.gguf", permute=False)
    assert not torch.allclose(logits(file), logits(llama), atol=0.1)


def test_llama_3_scaling_comes_from_its_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    folder = make_checkpoint(tmp_path / "model", "llama", seed=6, rope_scaling=scaling)
    file = write_gguf(folder, tmp_path / "x.gguf")
    unscaled = write_gguf(make_checkpoint(tmp_path / "plain", "llama", seed=6), tmp_path / "plain.gguf")
    torch.testing.assert_close(logits(file), logits(folder), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(unscaled), logits(folder), atol=0.1)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_types_give_the_logits_of_what_they_store(
    kind: Type, family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    file = write_gguf(folder, tmp_path / "x.gguf", matrices_as(kind))
    stored = dequantised_copy(folder, tmp_path / "stored", matrices_as(kind))
    assert logits(file).equal(logits(stored))
    assert not logits(file).equal(logits(folder))  # the control: the type did cost something


def test_types_may_differ_from_tensor_to_tensor(llama: Path, tmp_path: Path) -> None:
    def choose(name: str, array: np.ndarray) -> Type:
        if array.ndim == 1:
            return Type.F32
        return Type.F16 if "embed" in name else Type.Q4_0 if "v_proj" in name else Type.Q8_0

    file = write_gguf(llama, tmp_path / "x.gguf", choose)
    assert logits(file).equal(logits(dequantised_copy(llama, tmp_path / "stored", choose)))
    assert "Q8_0" in describe_types(open_gguf(file)) and "F16" in describe_types(open_gguf(file))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precisions_round_once(dtype: str, llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "x.gguf", matrices_as(Type.Q8_0))
    stored = load(dequantised_copy(llama, tmp_path / "stored", matrices_as(Type.Q8_0)), dtype).state_dict()
    for name, tensor in load(file, dtype).state_dict().items():
        assert tensor.dtype == getattr(torch, dtype) and tensor.equal(stored[name])


# --- blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(DECODERS), ids=lambda kind: kind.name)
def test_blocks_decode_as_their_definition_says(kind: Type) -> None:
    raw = random_blocks(kind, (3, 512), seed=1)
    ours = dequantize(raw, quant_type(int(kind)))
    np.testing.assert_allclose(ours, decode(kind, raw), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(ours, gguf.dequantize(raw, kind))


def _readable(kind: Type) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("kind", [kind for kind in Type if _readable(kind)], ids=lambda kind: kind.name)
def test_every_type_the_gguf_package_reads_is_read(kind: Type) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (2, 2 * block_bytes), dtype=np.uint8)
    ours = dequantize(raw, quant_type(int(kind)))
    assert ours.shape == (2, 2 * block_size) and ours.dtype == np.float32
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(ours, np.asarray(gguf.dequantize(raw, kind)).reshape(2, -1))


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_super_blocks_give_the_logits_of_what_they_store(kind: Type, tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "model", "llama", seed=7, tokenizer=False, hidden_size=256, intermediate_size=256, num_layers=1
    )
    scale = {Type.Q4_K: 2e-4, Type.Q6_K: 5e-5}[kind]
    stored: dict[str, np.ndarray] = {}

    def encode(name: str, array: np.ndarray, kind: Type) -> np.ndarray:
        if array.ndim == 1:
            stored[name] = array
            return array
        raw = random_blocks(kind, array.shape, seed=len(stored), scale=scale)
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        numbers = decode(kind, raw)
        stored[name] = numbers if heads is None else deinterleave(numbers, heads)
        return raw

    file = write_gguf(folder, tmp_path / "x.gguf", matrices_as(kind), encode=encode)
    save_file(
        {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in stored.items()}, folder / "model.safetensors"
    )
    (folder / "tokenizer.json").write_bytes((make_tokenizer(tmp_path) / "tokenizer.json").read_bytes())
    expected = logits(folder)
    assert expected.std() > 0.1
    config = EngineArgs(model=str(file), dtype="float32", tokenizer=str(folder)).create_engine_config()
    actual = PagedDriver(load_model(config.model, config.load, torch.device("cpu"))).step([(0, TOKENS)])[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def make_tokenizer(folder: Path) -> Path:
    from tests.checkpoints import write_tokenizer

    target = folder / "tokenizer"
    target.mkdir(exist_ok=True)
    write_tokenizer(target)
    return target


# --- reading parts ----------------------------------------------------------------------------------------


def test_a_part_of_a_tensor_is_that_part_of_the_whole(llama: Path, tmp_path: Path) -> None:
    """Also of rows that lie elsewhere in the file, of vectors, and along columns."""
    arrays = load_arrays(llama)
    file = open_gguf(write_gguf(llama, tmp_path / "x.gguf"))
    for tensor in checkpoint_tensors(file):
        whole = torch.from_numpy(arrays[tensor.name])
        weight = GGUFWeight(tensor, torch.float32)
        assert tuple(weight.shape) == tuple(whole.shape)
        for dim, size in enumerate(whole.shape):
            assert weight.narrow(dim, size // 3, size // 2).equal(whole.narrow(dim, size // 3, size // 2)), tensor.name


def test_pieces_change_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(llama, tmp_path / "x.gguf", matrices_as(Type.Q8_0))
    whole = load(file).state_dict()
    monkeypatch.setattr(gguf_loader, "NUMBERS_PER_PIECE", 200)  # three rows at a time
    assert all(tensor.equal(whole[name]) for name, tensor in load(file).state_dict().items())


def test_loading_holds_no_second_copy_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", seed=8, hidden_size=512, intermediate_size=1024)
    file = write_gguf(folder, tmp_path / "x.gguf", matrices_as(Type.Q8_0), tokenizer=False)
    monkeypatch.setattr(gguf_loader, "NUMBERS_PER_PIECE", 2**14)
    numbers = sum(array.size for array in load_arrays(folder).values())
    tracemalloc.start()  # numpy's arrays are traced, torch's are not
    for _, weight in iterate_gguf_weights(file, torch.float32):
        weight.narrow(0, 0, weight.shape[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * numbers / 10


# --- what is refused --------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "x.gguf", drop=("model.layers.1.mlp.up_proj.weight",))
    with pytest.raises(CheckpointError, match=r"x\.gguf.*missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(file)


def test_an_unknown_tensor_is_named(llama: Path, tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, dtype=np.float32))

    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor blk\.0\.attn_sinks\.weight"):
        load(write_gguf(llama, tmp_path / "x.gguf", change=change))


def test_a_mis_shaped_tensor_is_named(llama: Path, tmp_path: Path) -> None:
    def encode(name: str, array: np.ndarray, kind: Type) -> np.ndarray:
        return array[:-1] if name == "model.layers.0.mlp.down_proj.weight" else array

    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor model\.layers\.0\.mlp\.down_proj\.weight has shape"):
        load(write_gguf(llama, tmp_path / "x.gguf", encode=encode))


def test_query_rows_that_are_no_whole_heads_are_refused(llama: Path, tmp_path: Path) -> None:
    def encode(name: str, array: np.ndarray, kind: Type) -> np.ndarray:
        return array[:-1] if name == "model.layers.0.self_attn.q_proj.weight" else array

    with pytest.raises(CheckpointError, match=r"x\.gguf: tensor blk\.0\.attn_q\.weight has 63 rows"):
        load(write_gguf(llama, tmp_path / "x.gguf", encode=encode))


@pytest.mark.parametrize("kind", [Type.I32, Type.Q8_K], ids=lambda kind: kind.name)
def test_a_type_that_is_no_weight_is_refused_before_anything_is_read(kind: Type, llama: Path, tmp_path: Path) -> None:
    block = gguf.GGML_QUANT_SIZES[kind]

    def change(writer: gguf.GGUFWriter) -> None:
        raw = np.zeros((2, block[1]), dtype=np.uint8)
        writer.add_tensor("blk.1.attn_odd.weight", raw, raw_dtype=kind)

    file = write_gguf(llama, tmp_path / "x.gguf", change=change)
    with pytest.raises(
        UnsupportedModelError, match=rf"x\.gguf: tensor blk\.1\.attn_odd\.weight is stored as {kind.name}"
    ):
        next(checkpoint_tensors(open_gguf(file)))


def test_without_the_gguf_package_the_extra_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised = write_gguf(llama, tmp_path / "q.gguf", matrices_as(Type.Q8_0))
    plain = write_gguf(llama, tmp_path / "f.gguf", matrices_as(Type.F16))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"q\.gguf: tensor .*pip install 'mini-vllm\[gguf\]'"):
        load(quantised)
    load(plain)  # float types need no package


# --- the files themselves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0], ids=lambda kind: kind.name)
def test_transformers_reads_the_same_model_from_these_files(
    family: str, kind: Type, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The writer of these tests follows the convention that others read by."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder = request.getfixturevalue(family)
    file = write_gguf(folder, tmp_path / "x.gguf", matrices_as(kind))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    theirs = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    ours = {tensor.name: tensor.read(0, tensor.shape[0]) for tensor in checkpoint_tensors(open_gguf(file))}
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, np.asarray(theirs[name]), err_msg=name)
