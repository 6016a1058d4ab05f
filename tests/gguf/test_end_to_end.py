"""Claims about running GGUF files: the engine and the command line take them like any model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from mini_vllm import LLM, SamplingParams
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.entrypoints.cli.main import main
from mini_vllm.exceptions import CheckpointError, ConfigError
from tests.checkpoints import make_checkpoint
from tests.gguf.writer import dequantised_copy, matrices_as, write_gguf

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["The capital of France is", "hello wörld 東京 🙂", "def add(a, b):"]
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "num_gpu_blocks_override": 60}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Family -> (folder, GGUF file)."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for family, options in (("llama", {}), ("qwen2", {"tie_word_embeddings": True, "vocab_size": 448})):
        folder = make_checkpoint(root / family, family, seed=9, **options)
        (root / f"{family}-gguf").mkdir()
        made[family] = folder, write_gguf(folder, root / f"{family}-gguf" / "x.gguf")
    return made


def completions(model: Path, **options: Any) -> list[tuple[list[int], list[int], str]]:
    llm = LLM(model=str(model), **OPTIONS | options)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [(output.prompt_token_ids, output.outputs[0].token_ids, output.outputs[0].text) for output in outputs]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gguf_file_completes_as_its_checkpoint_does(family: str, models: dict[str, tuple[Path, Path]]) -> None:
    folder, file = models[family]
    assert completions(file) == completions(folder)


def test_a_quantised_file_completes_as_the_numbers_it_stores_do(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, _ = models["llama"]
    file = write_gguf(folder, tmp_path / "q.gguf", matrices_as(Type.Q8_0))
    assert completions(file) == completions(dequantised_copy(folder, tmp_path / "stored", matrices_as(Type.Q8_0)))


def test_a_folder_that_holds_one_gguf_file_is_a_model(models: dict[str, tuple[Path, Path]]) -> None:
    folder, file = models["llama"]
    assert completions(file.parent) == completions(folder)


def test_any_name_will_do_with_the_load_format(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder, file = models["llama"]
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(file.read_bytes())
    assert completions(blob, load_format="gguf") == completions(folder)


def test_a_tokenizer_may_come_from_a_folder_or_another_file(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, file = models["llama"]
    bare = write_gguf(folder, tmp_path / "bare.gguf", tokenizer=False)
    with pytest.raises(CheckpointError, match=r"bare\.gguf: tokenizer\.ggml\.model"):
        EngineArgs(model=str(bare)).load_tokenizer()
    for tokenizer in (folder, file):
        assert EngineArgs(model=str(bare), tokenizer=str(tokenizer)).load_tokenizer().encode("hello")[0] == 1


def test_random_weights_may_take_the_files_shape(models: dict[str, tuple[Path, Path]]) -> None:
    assert (
        EngineArgs(model=str(models["llama"][1]), load_format="dummy").create_engine_config().load.load_format
        == "dummy"
    )


def test_the_end_of_sequence_comes_from_the_file(models: dict[str, tuple[Path, Path]]) -> None:
    args = EngineArgs(model=str(models["llama"][1]))
    assert args.load_eos_token_ids(args.load_hf_config()) == (2,)
    assert args.load_generation_config() == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"load_format": "safetensors"}, ConfigError, "load_format: .* is a GGUF file"),
        ({"model": "nowhere/x.gguf"}, CheckpointError, r"there is no file .*x\.gguf"),
        ({"model": None, "load_format": "gguf"}, ConfigError, r"needs the path of a \.gguf file"),
        ({"model": str(ROOT / "tests"), "load_format": "gguf"}, CheckpointError, "exactly one GGUF model, found none"),
    ],
)
def test_what_cannot_be_loaded_says_why(
    options: dict[str, Any], error: type[Exception], message: str, models: dict[str, tuple[Path, Path]]
) -> None:
    with pytest.raises(error, match=message):
        EngineArgs(**{"model": str(models["llama"][1])} | options).create_engine_config()


def test_the_command_line_completes_with_a_gguf_file(
    models: dict[str, tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = models["llama"]
    command = ["generate", "--prompt", PROMPTS[0], "--max-tokens", "8", "--temperature", "0", "--json"]
    command += ["--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "40"]
    results = []
    for model in (file, folder):
        assert main([*command, "--model", str(model)]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]


def test_the_command_line_tells_a_broken_file_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert main(["generate", "--prompt", "a", "--model", str(tmp_path / "x.gguf")]) == 2
    assert capfd.readouterr().err.startswith("mini-vllm: error: x.gguf: truncated")


def test_reading_config_and_tokenizer_needs_no_torch(models: dict[str, tuple[Path, Path]]) -> None:
    code = (
        "import sys\n"
        "from mini_vllm.gguf.config import gguf_hf_config\n"
        "from mini_vllm.gguf.reader import open_gguf\n"
        "from mini_vllm.gguf.tokenizer import gguf_tokenizer\n"
        "from mini_vllm.gguf.weights import checkpoint_tensors\n"
        "file = open_gguf(sys.argv[1])\n"
        "gguf_hf_config(file), gguf_tokenizer(file), [t.read(0, 1) for t in checkpoint_tensors(file)]\n"
        "print(sorted({'torch', 'gguf'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, models["llama"][1]], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
