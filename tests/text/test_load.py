"""Claims about which files make a tokenizer, and about hostile ones."""

import json
import shutil
from pathlib import Path

import pytest

from mini_vllm.exceptions import CheckpointError, InvalidParameterError
from mini_vllm.text import reading
from mini_vllm.text.tokenizer import Tokenizer
from tests.checkpoints import write_tokenizer
from tests.text import spm
from tests.text.gpt2_files import write_layout


def test_the_richest_file_is_taken(tmp_path: Path) -> None:
    spm.write_folder(tmp_path, "llama")
    sentencepiece = Tokenizer.from_folder(tmp_path)
    assert len(sentencepiece) == 700
    write_layout(tmp_path, "gpt2")
    assert len(Tokenizer.from_folder(tmp_path)) == 601
    write_tokenizer(tmp_path, "llama")
    assert len(Tokenizer.from_folder(tmp_path)) == 384
    by_file = Tokenizer.from_folder(tmp_path / "tokenizer.model")
    assert by_file.encode("a") == sentencepiece.encode("a"), "a file that is named is the one that is read"


@pytest.mark.parametrize("name", ["spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_files_go_by_several_names(tmp_path: Path, name: str) -> None:
    spm.write_folder(tmp_path, "t5", {"tokenizer_class": "T5Tokenizer"}, name)
    ids = Tokenizer.from_folder(tmp_path).encode("hello world")
    assert ids == [*spm.processor("t5").encode("hello world"), 1], "T5 ends a text with EOS"


def test_half_of_a_pair_of_files_is_told(tmp_path: Path) -> None:
    write_layout(tmp_path, "gpt2")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(
        CheckpointError, match=r"has none .*looked for tokenizer\.json.*it has vocab\.json, which alone"
    ):
        Tokenizer.from_folder(tmp_path)


def test_a_panic_of_the_rust_side_is_an_error_with_the_files_name(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama")
    path = tmp_path / "tokenizer.json"
    good = json.loads(path.read_text())
    broken = []
    for change in (
        {"model": {**good["model"], "merges": [["a", "zz"]]}},
        {"model": {**good["model"], "vocab": {"a": -1}}},
        {"model": {**good["model"], "continuing_subword_prefix": "####", "merges": [["t", "h"]]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable") as caught:
            Tokenizer.from_folder(tmp_path)
        broken.append(caught.value)
    assert len(broken) == 5


def test_a_file_of_absurd_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 1000)
    for make in (
        lambda d: write_tokenizer(d, "llama"),
        lambda d: write_layout(d, "gpt2"),
        lambda d: spm.write_folder(d, "t5"),
    ):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        make(tmp_path)
        with pytest.raises(CheckpointError, match=r"has \d+ bytes; a tokenizer file may have 1000"):
            Tokenizer.from_folder(tmp_path)


def test_half_a_surrogate_pair_is_refused_by_name(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama")
    with pytest.raises(InvalidParameterError, match="prompt: is not valid Unicode"):
        Tokenizer.from_folder(tmp_path).encode("a\ud800b")


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2"])
def test_the_engine_runs_a_checkpoint_with_the_older_files(tmp_path: Path, kind: str) -> None:
    from mini_vllm import LLM, SamplingParams
    from tests.checkpoints import make_checkpoint

    make_checkpoint(tmp_path, "llama", tokenizer=False, vocab_size=704)
    if kind == "gpt2":
        write_layout(tmp_path, "gpt2")
        make_checkpoint(tmp_path, "llama", tokenizer=False, vocab_size=704)
    else:
        spm.write_folder(tmp_path, "llama", {"tokenizer_class": "LlamaTokenizer"})
    llm = LLM(str(tmp_path), dtype="float32", max_model_len=64, seed=0)
    [output] = llm.generate("hello world", SamplingParams(max_tokens=8, temperature=0))
    tokenizer = llm.get_tokenizer()
    assert output.prompt_token_ids == tokenizer.encode("hello world")
    assert len(output.outputs[0].token_ids) == 8 or output.outputs[0].finish_reason == "stop"
