"""Claims about encoding and decoding, against transformers' fast tokenizers."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, processors, trainers

from mini_vllm.engine.arg_utils import DEFAULT_MODEL
from mini_vllm.exceptions import CheckpointError, InvalidParameterError
from mini_vllm.text.tokenizer import Tokenizer
from tests.checkpoints import write_tokenizer

TEXTS = [
    "hello world",
    "",
    " leading and trailing ",
    "def f(x):\n    return x  # naïve café 東京 🙂\n",
    "<|im_start|>user\n</s> <s> <unk>",
    "a" * 300,
    "\x00\u200d\ufeffé",
]


def make_sentencepiece_like(folder: Path, *, add_bos_token: bool | None, post_processor: bool) -> Path:
    """A BPE with metaspaces and byte fallback, as Llama 2 and TinyLlama have."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = RustTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the cat"] * 5, trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]  # bytes are ordinary tokens
    tokenizer = RustTokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "unk_token": "<unk>"}
    if add_bos_token is not None:
        config["add_bos_token"] = add_bos_token  # type: ignore[assignment]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for family in ("llama", "qwen2"):
        (root / family).mkdir()
        write_tokenizer(root / family, family)
    return {
        "llama": root / "llama",
        "qwen2": root / "qwen2",
        "sentencepiece": make_sentencepiece_like(root / "spm", add_bos_token=None, post_processor=True),
        "bundled": DEFAULT_MODEL,
    }


def oracle(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "qwen2", "sentencepiece", "bundled"])
def test_ids_and_texts_equal_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    ours, theirs = Tokenizer.from_folder(folders[name]), oracle(folders[name])
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), (text, special)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert set(theirs.all_special_ids) <= set(ours.all_special_ids)


@pytest.mark.parametrize("name", ["llama", "sentencepiece", "bundled"])
def test_bos_is_added_exactly_once(folders: dict[str, Path], name: str) -> None:
    tokenizer = Tokenizer.from_folder(folders[name])
    assert tokenizer.encode("the cat").count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode("the cat", add_special_tokens=False).count(tokenizer.bos_token_id) == 0


def test_a_legacy_config_with_add_bos_token_and_no_post_processor_gets_one_bos(tmp_path: Path) -> None:
    with_flag = Tokenizer.from_folder(make_sentencepiece_like(tmp_path / "a", add_bos_token=True, post_processor=False))
    assert with_flag.encode("the cat")[0] == 1
    assert with_flag.encode("the cat")[1:] == with_flag.encode("the cat", add_special_tokens=False)
    assert with_flag.encode_batch(["the", "cat"]) == [with_flag.encode("the"), with_flag.encode("cat")]
    both = Tokenizer.from_folder(make_sentencepiece_like(tmp_path / "b", add_bos_token=True, post_processor=True))
    assert both.encode("the cat").count(1) == 1
    neither = Tokenizer.from_folder(make_sentencepiece_like(tmp_path / "c", add_bos_token=None, post_processor=False))
    assert neither.encode("the cat").count(1) == 0, "broken control: without the flag there is none"


def test_a_batch_is_encoded_as_its_texts_one_by_one(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_folder(folders["llama"])
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    raw = RustTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_truncation(max_length=3)
    raw.enable_padding(length=8, pad_id=0, pad_token="<|endoftext|>")
    raw.save(str(tmp_path / "tokenizer.json"))
    assert len(raw.encode("hello world and goodbye world again").ids) == 8, "broken control: the file does truncate"
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello world and goodbye world again")).endswith("again")
    assert len(tokenizer.encode("hello")) < 8


def test_tokens_that_only_the_config_declares_are_added_at_their_ids(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    size = Tokenizer.from_folder(tmp_path).vocab_size
    config["added_tokens_decoder"] = {str(size): {"content": "<tool>", "special": True, "normalized": False}}
    path.write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<tool>b")[1] == size and tokenizer.vocab_size == size + 1
    assert tokenizer.decode([size]) == "" and tokenizer.decode([size], skip_special_tokens=False) == "<tool>"
    config["added_tokens_decoder"] = {str(size + 7): {"content": "<tool>", "special": True}}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"id {size + 7}"):
        Tokenizer.from_folder(tmp_path)


def test_named_tokens_may_live_in_special_tokens_map(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_ids_convert_to_the_vocabularys_spelling_and_back(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_folder(folders["llama"])
    ids = tokenizer.encode("hello world")
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(ids)) == ids
    assert tokenizer.convert_ids_to_tokens(2) == "</s>"
    assert tokenizer.convert_ids_to_tokens([10**6]) == [None]


def test_a_missing_or_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder.*looked there for tokenizer\.json"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a sound SentencePiece model"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable"):
        Tokenizer.from_folder(tmp_path)
    write_tokenizer(tmp_path, "llama")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: must hold a JSON object"):
        Tokenizer.from_folder(tmp_path)


# -- where chat templates are found ---------------------------------------------------------------------------------


def with_template_entry(folder: Path, entry: object) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": entry}))
    return Tokenizer.from_folder(folder)


def test_named_templates_of_the_config_are_chosen_by_name_and_by_tools(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    entry = [
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "T"},
        {"name": "rag", "template": "R"},
    ]
    tokenizer = with_template_entry(tmp_path, entry)
    messages = [{"role": "user", "content": "x"}]

    def render(**kwargs):
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    tools = [{"type": "function"}]
    assert [render(), render(tools=tools), render(chat_template="rag"), render(chat_template="X{{ 1 }}")] == [
        "D", "T", "R", "X1",
    ]  # fmt: skip
    theirs = oracle(tmp_path)
    assert theirs.apply_chat_template(messages, tokenize=False, tools=tools) == "T"


def test_template_files_win_over_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    (tmp_path / "chat_template.jinja").write_text("FILE")
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("TOOL")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_templates == {"default": "FILE", "tool_use": "TOOL"}


def test_a_tokenizer_without_template_says_so(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "qwen2")
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidParameterError, match=r"chat_template: .*no default chat template"):
        Tokenizer.from_folder(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])


def test_a_rendered_chat_gets_no_second_bos(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama")  # its template writes bos_token, its post-processor would add another
    tokenizer = Tokenizer.from_folder(tmp_path)
    messages = [{"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids.count(tokenizer.bos_token_id) == 1
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.encode(text).count(tokenizer.bos_token_id) == 2, "broken control: encoding it as text doubles it"
    theirs = oracle(tmp_path)
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_a_folder_can_be_named_by_its_tokenizer_file(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("copy"))
    assert Tokenizer.from_folder(copy / "tokenizer.json").name_or_path == str(copy)
