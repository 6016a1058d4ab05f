"""Models by name, from a hub that runs on this machine and from caches that the tests build. No other network."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file

from mini_vllm import LLM, SamplingParams
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.entrypoints.cli.main import main
from mini_vllm.exceptions import CheckpointError, ConfigError, UnsupportedModelError
from mini_vllm.hub import HubName, fetch_gguf, fetch_snapshot, fetch_weights, parse_hub_name
from mini_vllm.weight_files import INDEX_FILE
from tests.checkpoints import make_checkpoint
from tests.hub_server import FakeHub, serve_hub

NAME = "someone/small-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
NOT_NEEDED = ("README.md", "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "x.onnx")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, beside files of the kinds that repositories hold and no engine needs."""
    folder = make_checkpoint(tmp_path_factory.mktemp("source"), num_shards=2, generation_config={"top_k": 5})
    for name in NOT_NEEDED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


def set_constants(patch: pytest.MonkeyPatch, **values: Any) -> None:
    """The library reads its environment when it is imported."""
    for name, value in values.items():
        patch.setattr(huggingface_hub.constants, name, value)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline; the working directory is empty as well."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    set_constants(monkeypatch, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE=True)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that can be reached, and an empty cache."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        set_constants(
            monkeypatch, HF_HUB_OFFLINE=False, ENDPOINT=server.url, HUGGINGFACE_CO_URL_TEMPLATE=template
        )  # fmt: skip
        yield server


def fill_cache(cache: Path, source: Path, *, without: tuple[str, ...] = (), ref: str = "main") -> Path:
    """`source` in the layout the library keeps: blobs, links to them from the commit's snapshot, and a ref."""
    home = cache / ("models--" + NAME.replace("/", "--"))
    snapshot = home / "snapshots" / COMMIT
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (home / "refs" / ref).write_text(COMMIT)
    for number, file in enumerate(sorted(source.glob("*.*"))):
        if file.name not in without:
            shutil.copy(file, home / "blobs" / f"{number:040x}")
            (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def outputs(**kwargs: Any) -> list[list[int]]:
    llm = LLM(**{"dtype": "float32", "num_threads": 1, "num_gpu_blocks_override": 20} | kwargs)
    try:
        return [
            list(output.outputs[0].token_ids)
            for output in llm.generate(["hello", "A request is"], GREEDY, use_tqdm=False)
        ]
    finally:
        llm.llm_engine.shutdown()


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubName("org/name")),
        ("gpt2", HubName("gpt2")),
        ("Org-1/some_Name.v2-7B", HubName("Org-1/some_Name.v2-7B")),
        ("org/name:Q4_K_M", HubName("org/name", "Q4_K_M")),
        *[(text, None) for text in ("", "a/b/c", "/abs/path", "./x", "../x", "~/x", "org/", "/name", "a b", "a\n")],
        *[(text, None) for text in ("org/..", "org/a--b", "org/a..b", "org/a.git", "x.", "org/name:", "org/näme")],
    ],
)  # fmt: skip
def test_only_what_can_be_a_repository_is_taken_for_one(text: str, expected: HubName | None) -> None:
    assert parse_hub_name(text) == expected


# --- from the cache, offline --------------------------------------------------------------------------------


def test_a_name_in_the_cache_gives_the_tokens_of_its_folder(cache: Path, checkpoint: Path) -> None:
    fill_cache(cache, checkpoint)
    assert outputs(model=NAME) == outputs(model=str(checkpoint))


def test_a_cache_elsewhere_is_named_by_download_dir(cache: Path, checkpoint: Path, tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "elsewhere", checkpoint)
    assert EngineArgs(model=NAME, download_dir=str(tmp_path / "elsewhere")).create_engine_config().model.model == str(
        snapshot
    )
    with pytest.raises(CheckpointError, match="nor in the hub cache"):
        EngineArgs(model=NAME).create_engine_config()


@pytest.mark.parametrize("revision", ["v1.0", COMMIT])
def test_a_revision_in_the_cache_is_found_by_tag_and_by_commit(cache: Path, checkpoint: Path, revision: str) -> None:
    snapshot = fill_cache(cache, checkpoint, ref="v1.0")
    assert EngineArgs(model=NAME, revision=revision).model_folder == snapshot
    with pytest.raises(CheckpointError, match="at revision 'v2'.*HF_HUB_OFFLINE"):
        _ = EngineArgs(model=NAME, revision="v2").model_folder
    with pytest.raises(CheckpointError, match="nor in the hub cache"):
        _ = EngineArgs(model=NAME).model_folder  # main was never fetched


def test_a_name_that_is_nowhere_says_what_was_tried(cache: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        LLM("someone/smal-lama")
    assert all(
        text in str(error.value)
        for text in ("model: ", "'someone/smal-lama'", "local folder", str(Path.cwd()), str(cache), "HF_HUB_OFFLINE")
    )


def test_a_path_that_can_be_no_name_is_not_looked_for_on_the_hub(cache: Path) -> None:
    for path in ("/no/such/folder", "./x", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"is no local folder, and no name on the hub.*config\.json"):
            LLM(path)


def test_a_shard_that_is_not_in_the_cache_is_named(cache: Path, checkpoint: Path) -> None:
    fill_cache(cache, checkpoint, without=(SHARDS[1],))
    with pytest.raises(CheckpointError, match=f"not whole: {SHARDS[1]} not in .*nothing was downloaded because HF_HUB"):
        LLM(NAME)


def test_a_cache_with_the_description_alone_says_so(cache: Path, checkpoint: Path) -> None:
    fill_cache(cache, checkpoint, without=(*SHARDS, INDEX_FILE, *NOT_NEEDED))
    with pytest.raises(CheckpointError, match="no weights of 'someone/small-llama' are in .*HF_HUB_OFFLINE"):
        LLM(NAME)
    assert outputs(model=NAME, load_format="dummy"), "which needs no weights"


def test_a_broken_link_in_the_cache_counts_as_missing(cache: Path, checkpoint: Path) -> None:
    snapshot = fill_cache(cache, checkpoint)
    (snapshot / SHARDS[0]).resolve().unlink()
    with pytest.raises(CheckpointError, match=f"not whole: {SHARDS[0]} not in"):
        LLM(NAME)


def test_a_local_folder_of_the_same_name_wins_and_the_log_says_so(
    cache: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill_cache(cache, checkpoint)
    shutil.copytree(checkpoint, NAME)
    with caplog.at_level(logging.INFO, "mini_vllm"):
        assert EngineArgs(model=NAME).model_folder == Path(NAME)
    assert f"model: {NAME} is the local folder of that name, not a repository of the hub" in caplog.text
    with pytest.raises(ConfigError, match=f"^revision: 'v1' is for repositories of the hub, but '{NAME}' is a local"):
        _ = EngineArgs(model=NAME, revision="v1").model_folder


def test_a_revision_of_the_bundled_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="^revision: 'v1' is for repositories of the hub"):
        _ = EngineArgs(revision="v1").model_folder


def test_the_tokenizer_may_be_a_name_of_its_own(cache: Path, checkpoint: Path, tmp_path: Path) -> None:
    snapshot = fill_cache(cache, checkpoint, without=("config.json",), ref="t")
    model = make_checkpoint(tmp_path / "no tokenizer", tokenizer=False, vocab_size=384)
    args = EngineArgs(model=str(model), tokenizer=NAME, tokenizer_revision="t")
    assert args.create_engine_config().model.tokenizer == str(snapshot)
    with pytest.raises(CheckpointError, match="^tokenizer: 'someone/small-llama' is neither"):
        EngineArgs(model=str(model), tokenizer=NAME).load_tokenizer()
    with pytest.raises(ConfigError, match="^tokenizer_revision: 't' is for repositories"):
        EngineArgs(model=str(model), tokenizer_revision="t").load_tokenizer()


def test_without_the_library_names_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="pip install huggingface_hub"):
        fetch_snapshot(NAME)
    assert EngineArgs().model_folder, "local folders need no library"


# --- from the network -----------------------------------------------------------------------------------------


def test_only_what_is_needed_is_downloaded_and_the_second_time_nothing(hub: FakeHub, checkpoint: Path) -> None:
    hub.add(NAME, checkpoint)
    assert outputs(model=NAME) == outputs(model=str(checkpoint))
    described = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX_FILE}
    assert sorted(hub.downloads()) == sorted([*described, *SHARDS])
    hub.log.clear()
    assert outputs(model=NAME) and hub.downloads() == []


def test_what_was_downloaded_is_there_offline(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, checkpoint)
    first = outputs(model=NAME)
    set_constants(monkeypatch, HF_HUB_OFFLINE=True)
    hub.log.clear()
    assert outputs(model=NAME) == first and hub.log == []


def test_what_was_downloaded_is_used_when_the_hub_is_down(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, checkpoint)
    first = outputs(model=NAME)
    set_constants(monkeypatch, ENDPOINT="http://127.0.0.1:9")
    assert outputs(model=NAME) == first
    with pytest.raises(CheckpointError, match="http://127.0.0.1:9 cannot be reached: .*refused"):
        LLM("someone/else")


def test_all_files_are_of_one_commit_though_the_branch_moves_on(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    first = hub.add(NAME, checkpoint)
    snapshot = fetch_snapshot(NAME)
    second = hub.add(NAME, make_checkpoint(tmp_path / "newer", num_shards=2, seed=9))
    fetch_weights(snapshot)
    assert snapshot.folder.name == snapshot.commit == first != second
    for name in SHARDS:
        assert (snapshot.folder / name).read_bytes() == (checkpoint / name).read_bytes()
    assert fetch_snapshot(NAME).commit == second, "broken control: without the pin it is the newer one"
    assert fetch_snapshot(NAME, first).commit == first


def test_an_interrupted_download_goes_on_where_it_ended(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, checkpoint)
    snapshot = fetch_snapshot(NAME)
    hub.break_after = 20_000
    set_constants(monkeypatch, DOWNLOAD_CHUNK_SIZE=1000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    fetch_weights(snapshot)
    ranges = [asked for how, _, asked in hub.log if how == "GET" and asked]
    assert len(ranges) == 1 and 10_000 < int(ranges[0].removeprefix("bytes=").rstrip("-")) <= 20_000
    for name in SHARDS:
        assert (snapshot.folder / name).read_bytes() == (checkpoint / name).read_bytes()


def test_no_weights_are_downloaded_for_an_architecture_that_is_not_served(
    hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Unheard"]}
    (folder / "config.json").write_text(json.dumps(config))
    hub.add(NAME, folder)
    with pytest.raises(UnsupportedModelError, match="Unheard"):
        LLM(NAME)
    assert "config.json" in hub.downloads() and not set(SHARDS) & set(hub.downloads())


def test_a_repository_with_pickles_only_says_how_to_convert(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    def ignore(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith("model") or name == "consolidated.safetensors"]

    hub.add(NAME, shutil.copytree(checkpoint, tmp_path / "pickled", ignore=ignore))
    with pytest.raises(CheckpointError, match=f"'{NAME}' has only pickled weights.*mini-vllm convert {NAME}"):
        LLM(NAME)
    assert "pytorch_model.bin" not in hub.downloads()


def test_what_the_error_says_works_convert_takes_names_too(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: tensor for shard in SHARDS for name, tensor in load_file(checkpoint / shard).items()}
    source = make_checkpoint(tmp_path / "pickled")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    hub.add(NAME, source)
    assert main(["convert", NAME, str(tmp_path / "new")]) == 0
    assert outputs(model=str(tmp_path / "new")) == outputs(model=str(checkpoint))
    hub.add("someone/safe", checkpoint)
    assert main(["convert", "someone/safe", str(tmp_path / "x")]) == 2
    assert main(["convert", NAME, str(tmp_path / "x"), "--revision", "v9"]) == 2
    assert main(["convert", str(source), str(tmp_path / "x"), "--revision", "v9"]) == 2
    errors = capsys.readouterr().err
    assert "has safetensors weights; there is nothing to convert" in errors
    assert "source: 'someone/small-llama' has no revision 'v9'" in errors and "is a local path" in errors


def test_an_index_that_names_a_file_the_repository_lacks_is_refused(
    hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "part")
    (folder / SHARDS[1]).unlink()
    hub.add(NAME, folder)
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]} not in .*the repository does not have it"):
        LLM(NAME)


@pytest.mark.parametrize(
    ("closed", "says"),
    [("GatedRepo", "is gated: ask for access at http://.*HF_TOKEN"), ("Forbidden", "could not be fetched|cannot be")],
)
def test_a_closed_repository_says_what_is_needed(hub: FakeHub, checkpoint: Path, closed: str, says: str) -> None:
    hub.add(NAME, checkpoint, closed=closed)
    with pytest.raises(CheckpointError, match=says):
        LLM(NAME)


def test_a_mistyped_name_or_revision_is_told_apart(hub: FakeHub, checkpoint: Path) -> None:
    hub.add(NAME, checkpoint)
    with pytest.raises(CheckpointError, match=r"'someone/smal' is neither a local folder \(.*\) nor a repository at"):
        LLM("someone/smal")
    with pytest.raises(CheckpointError, match=f"'{NAME}' has no revision 'v9'"):
        LLM(NAME, revision="v9")


def test_downloads_show_no_bars_without_a_terminal_or_when_told_not_to(
    hub: FakeHub, checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, checkpoint)
    fetch_weights(fetch_snapshot(NAME))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fetch_weights(fetch_snapshot(NAME, download_dir="again", use_tqdm=False), use_tqdm=False)
    assert "Fetching" not in capfd.readouterr().err
    fetch_snapshot(NAME, download_dir="third")
    assert "Fetching" in capfd.readouterr().err, "broken control"


# --- GGUF ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf_repo(tmp_path: Path) -> Path:
    folder = tmp_path / "gguf"
    folder.mkdir()
    names = (
        "m-Q4_K_M.gguf",
        "m-Q8_0.gguf",
        "m-f16-00001-of-00002.gguf",
        "m-f16-00002-of-00002.gguf",
        "mmproj-m-f16.gguf",
    )
    for name in names:  # fmt: skip
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize(
    ("quant", "files"),
    [
        ("Q4_K_M", ["m-Q4_K_M.gguf"]), ("q8_0", ["m-Q8_0.gguf"]), ("m-Q8_0", ["m-Q8_0.gguf"]),
        ("F16", ["m-f16-00001-of-00002.gguf", "m-f16-00002-of-00002.gguf"]),
    ],
)  # fmt: skip
def test_one_gguf_model_of_several_is_named_by_its_tag(
    hub: FakeHub, gguf_repo: Path, quant: str, files: list[str]
) -> None:
    hub.add(NAME, gguf_repo)
    path = fetch_gguf(fetch_snapshot(NAME), quant)
    assert path.name == files[0] and path.read_bytes() == files[0].encode()
    assert sorted(hub.downloads()) == files


@pytest.mark.parametrize("quant", [None, "Q4", "Q5_K_M", "mmproj-m-f16"])
def test_a_tag_that_does_not_name_one_gguf_model_lists_those_there_are(
    hub: FakeHub, gguf_repo: Path, quant: str | None
) -> None:
    hub.add(NAME, gguf_repo)
    with pytest.raises(CheckpointError, match=f"exactly one.*has Q4_K_M, Q8_0, f16; name one as {NAME}:TAG"):
        fetch_gguf(fetch_snapshot(NAME), quant)
    assert hub.downloads() == []


def test_gguf_is_chosen_by_name_by_format_or_because_nothing_else_is_there(hub: FakeHub, gguf_repo: Path) -> None:
    def name_of(**kwargs: Any) -> tuple[str, bool]:
        args = EngineArgs(**kwargs)
        return args.model_folder.name, args.is_gguf

    hub.add(NAME, gguf_repo)
    assert name_of(model=f"{NAME}:Q8_0") == ("m-Q8_0.gguf", True)
    with pytest.raises(CheckpointError, match="must name exactly one GGUF model, found 3"):
        name_of(model=NAME)
    for name in ("m-Q4_K_M.gguf", "m-f16-00001-of-00002.gguf", "m-f16-00002-of-00002.gguf"):
        (gguf_repo / name).unlink()
    hub.add("someone/one", gguf_repo)
    assert name_of(model="someone/one") == name_of(model="someone/one", load_format="gguf") == ("m-Q8_0.gguf", True)
    with pytest.raises(ConfigError, match="load_format: .* names a GGUF file"):
        name_of(model=f"{NAME}:Q8_0", load_format="safetensors")


def test_safetensors_are_taken_where_both_are_there(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "both")
    (folder / "m-Q8_0.gguf").write_bytes(b"GGUF")
    hub.add(NAME, folder)
    assert not EngineArgs(model=NAME).is_gguf
    for name in (*SHARDS, INDEX_FILE, "pytorch_model.bin"):
        (folder / name).unlink()
    hub.add("someone/described", folder)
    with pytest.raises(CheckpointError, match="no safetensors weights, but GGUF files; choose one: .*described:Q8_0"):
        LLM("someone/described")


# --- by environment, as users do it -------------------------------------------------------------------------------


def test_the_variables_of_the_library_are_obeyed(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add(NAME, checkpoint)
    code = f"from mini_vllm.engine.arg_utils import EngineArgs; print(EngineArgs(model={NAME!r}).model_folder)"
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_OFFLINE"} | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }  # fmt: skip

    def run(offline: str) -> "subprocess.CompletedProcess[str]":
        variables = environment | {"HF_HUB_OFFLINE": offline}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)

    refused = run("1")
    assert refused.returncode == 1 and "HF_HUB_OFFLINE is set" in refused.stderr and hub.log == []
    online = run("0")
    assert online.returncode == 0 and online.stdout.startswith(str(tmp_path / "home")), online.stderr
    assert "config.json" in hub.downloads() and "Bearer hf_secret" in hub.tokens
    assert run("1").stdout == online.stdout
