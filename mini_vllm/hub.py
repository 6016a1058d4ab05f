"""Models by name: `org/name` of the Hugging Face hub as a folder of its cache, with only the files that are needed.

`fetch_snapshot` is handed a name and a revision and brings what describes a model (configs, tokenizer, templates);
`fetch_weights` or `fetch_gguf` bring the weights of the same commit later, when the description proved to be one this
engine can serve. The work (cache, resuming, tokens, mirrors) is done by the huggingface_hub library, whose variables
apply: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT. It is imported when the first name comes. Whatever
goes wrong is a `CheckpointError` that says what was tried.
"""

import glob
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_vllm.exceptions import CheckpointError, ConfigError
from mini_vllm.logger import init_logger
from mini_vllm.weight_files import INDEX_FILE, WEIGHTS_FILE, no_weights_error, tensors_by_file

logger = init_logger(__name__)

METADATA_FILES = (
    "config.json", "generation_config.json", INDEX_FILE,
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What a model is described by; small files, all of them fetched before any weights."""

_NAME = re.compile(r"(?P<repo>(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*)(?::(?P<quant>[A-Za-z0-9_.]+))?", re.ASCII)
_SPLIT = re.compile(r"-(?P<number>\d{5})-of-\d{5}\.gguf$")
_PICKLES = re.compile(r"pytorch_model[^/]*\.bin(\.index\.json)?")
_PROJECTOR = "mmproj"
"""Part of the names of GGUF files that hold an image encoder beside a model."""


@dataclass(frozen=True)
class HubName:
    """`org/name`, or `org/name:Q4_K_M` for one of the GGUF files in it."""

    repo_id: str
    quant: str | None = None


@dataclass(frozen=True)
class HubSnapshot:
    """One commit of a repository in the cache. folder: where its files are, those that were fetched."""

    repo_id: str
    commit: str
    folder: Path
    cache_dir: Path | None
    field: str = "model"
    """The argument that named it, for messages."""


def parse_hub_name(text: str) -> HubName | None:
    """What `text` names on the hub; None if no repository can be called so."""
    match = _NAME.fullmatch(text)
    if match is None or "--" in match["repo"] or ".." in match["repo"] or match["repo"].endswith((".", "-", ".git")):
        return None
    return HubName(match["repo"], match["quant"])


def fetch_snapshot(
    repo_id: str,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    *,
    field: str = "model",
    use_tqdm: bool = True,
) -> HubSnapshot:
    """What describes the model at `revision` (a branch, tag or commit; None is the default branch).

    Raises `CheckpointError` if the repository or revision is not there, is not readable with this token, or cannot be
    reached and is not in the cache.
    """
    cache_dir = None if download_dir is None else Path(download_dir).expanduser()
    request = _Request(repo_id, revision, cache_dir, field)
    folder = request.download(METADATA_FILES, use_tqdm)
    logger.info("%s: %s at commit %s, in %s", field, repo_id, folder.name, folder)
    return HubSnapshot(repo_id, folder.name, folder, cache_dir, field)


def fetch_weights(snapshot: HubSnapshot, use_tqdm: bool = True) -> None:
    """Bring the safetensors files of `snapshot` into its folder, and no others.

    Raises `CheckpointError` when it has none: for pickled weights saying how to convert them, for GGUF how to ask.
    """
    if not (snapshot.folder / WEIGHTS_FILE).is_file():  # a commit never changes: what is there stays right
        _fetch(snapshot, _weight_names(snapshot), use_tqdm)


def fetch_gguf(snapshot: HubSnapshot, quant: str | None, use_tqdm: bool = True) -> Path:
    """Bring one GGUF model and return its (first) file.

    quant: the part of the file's name that tells it from others, such as 'Q4_K_M'; None if there is only one.
    Raises `CheckpointError` listing what there is when that does not name exactly one.
    """
    models = _gguf_models(_list_files(snapshot))
    matching = [first for first in models if quant is None or _has_tag(first, quant)]
    if len(matching) != 1:
        asked = f"{snapshot.repo_id}:{quant}" if quant else snapshot.repo_id
        tags = ", ".join(sorted(_tag(name) for name in models)) or "no GGUF model at all"
        hint = f"; name one as {snapshot.repo_id}:TAG" if len(models) > 1 else ""
        raise CheckpointError(
            f"{snapshot.field}: {asked!r} must name exactly one GGUF model, found {len(matching)}. "
            f"The repository has {tags}{hint}"
        )
    files = models[matching[0]]
    _fetch(snapshot, files, use_tqdm)
    return snapshot.folder / files[0]


def fetch_pickles(snapshot: HubSnapshot, use_tqdm: bool = True) -> None:
    """Bring `pytorch_model*.bin`, which only `mini-vllm convert` reads. Raises `CheckpointError` where none are needed
    or none are there."""
    names = _list_files(snapshot)
    if WEIGHTS_FILE in names or INDEX_FILE in names:
        raise CheckpointError(
            f"{snapshot.field}: {snapshot.repo_id!r} has safetensors weights; there is nothing to convert"
        )
    pickles = [name for name in names if _PICKLES.fullmatch(name)]
    if not pickles:
        raise CheckpointError(f"{snapshot.field}: {snapshot.repo_id!r} has no pytorch_model.bin to convert")
    _fetch(snapshot, pickles, use_tqdm)


def has_gguf(snapshot: HubSnapshot) -> bool:
    """Whether the repository holds GGUF models."""
    return bool(_gguf_models(_list_files(snapshot)))


# --- which files ------------------------------------------------------------------------------------------


def _weight_names(snapshot: HubSnapshot) -> list[str]:
    """What `find_weight_files` will look for in this folder."""
    if (snapshot.folder / INDEX_FILE).is_file():
        return sorted(tensors_by_file(snapshot.folder / INDEX_FILE))
    names = _list_files(snapshot)
    if WEIGHTS_FILE in names:
        return [WEIGHTS_FILE]
    if offline := _because_offline(_library()):
        raise CheckpointError(f"{snapshot.field}: no weights of {snapshot.repo_id!r} are in {snapshot.folder}{offline}")
    if models := _gguf_models(names):
        raise CheckpointError(
            f"{snapshot.field}: {snapshot.repo_id!r} has no safetensors weights, but GGUF files; choose one: "
            + ", ".join(f"{snapshot.repo_id}:{_tag(first)}" for first in sorted(models))
        )
    raise no_weights_error(snapshot.repo_id, names)


def _gguf_models(names: Iterable[str]) -> dict[str, list[str]]:
    """First file -> all files of each GGUF model among `names`."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if not name.endswith(".gguf") or _PROJECTOR in name:
            continue
        split = _SPLIT.search(name)
        first = name if split is None else f"{name[: split.start('number')]}00001{name[split.end('number') :]}"
        models.setdefault(first, []).append(name)
    return models


def _tag(name: str) -> str:
    """The part of a GGUF file's name that says how its weights are stored, or the whole stem."""
    stem = _SPLIT.sub("", name.rpartition("/")[2]).removesuffix(".gguf")
    match = re.search(r"(?:^|[-._])((?:I?Q\d\w*|TQ\d\w*|BF16|F16|F32|MXFP4\w*))$", stem, re.IGNORECASE)
    return match[1] if match else stem


def _has_tag(name: str, quant: str) -> bool:
    stem = _SPLIT.sub("", name.rpartition("/")[2]).removesuffix(".gguf")
    return quant.lower() in (_tag(name).lower(), stem.lower())


# --- the library ------------------------------------------------------------------------------------------


def _list_files(snapshot: HubSnapshot) -> list[str]:
    """Names of all files of the commit; of those in the cache when the hub cannot be asked."""
    request = _Request(snapshot.repo_id, snapshot.commit, snapshot.cache_dir, snapshot.field)
    if not request.library.constants.HF_HUB_OFFLINE:
        try:
            return list(request.library.HfApi().list_repo_files(snapshot.repo_id, revision=snapshot.commit))
        except Exception as error:  # whatever client it uses, in whatever version
            logger.warning("%s: cannot list the files of %s: %s", snapshot.field, snapshot.repo_id, _shown(error))
    files = (path for path in snapshot.folder.rglob("*") if path.is_file())
    return [path.relative_to(snapshot.folder).as_posix() for path in files]


def _fetch(snapshot: HubSnapshot, names: list[str], use_tqdm: bool) -> None:
    missing = [name for name in names if not (snapshot.folder / name).is_file()]
    if missing and not _library().constants.HF_HUB_OFFLINE:
        logger.info("%s: fetching %s of %s", snapshot.field, ", ".join(missing), snapshot.repo_id)
        request = _Request(snapshot.repo_id, snapshot.commit, snapshot.cache_dir, snapshot.field)
        request.download([glob.escape(name) for name in missing], use_tqdm)
    absent = [name for name in missing if not (snapshot.folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{snapshot.field}: {snapshot.repo_id!r} is not whole: {', '.join(absent)} not in {snapshot.folder}"
            f"{_because_offline(_library()) or ', and the repository does not have it'}"
        )


@dataclass(frozen=True)
class _Request:
    """One repository at one revision, asked through the library; its errors become ours."""

    repo_id: str
    revision: str | None
    cache_dir: Path | None
    field: str

    @property
    def library(self) -> Any:
        return _library()

    def download(self, patterns: Iterable[str], use_tqdm: bool) -> Path:
        """The snapshot's folder, with the files that match."""
        hub = self.library
        try:
            return Path(
                hub.snapshot_download(
                    self.repo_id,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    allow_patterns=list(patterns),
                    tqdm_class=None if use_tqdm and sys.stderr.isatty() else _silent_bar(hub),
                    library_name="mini_vllm",
                )
            )
        except Exception as error:
            raise CheckpointError(f"{self.field}: {self._explain(hub, error)}") from error

    def _explain(self, hub: Any, error: Exception) -> str:
        errors, page = hub.errors, f"{hub.constants.ENDPOINT}/{self.repo_id}"
        if isinstance(error, errors.GatedRepoError):
            return f"{self.repo_id!r} is gated: ask for access at {page} and set HF_TOKEN to a token of that account"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{self.repo_id!r} is neither a local folder ({Path(self.repo_id).absolute()}) nor a repository at "
                f"{page} that can be seen; for a private one, set HF_TOKEN to a token that may read it"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{self.repo_id!r} has no revision {self.revision!r} at {page}"
        if isinstance(error, errors.LocalEntryNotFoundError):
            where = self.cache_dir or hub.constants.HF_HUB_CACHE
            at = f" at revision {self.revision!r}" if self.revision else ""
            reason = _because_offline(hub) or f"; {hub.constants.ENDPOINT} cannot be reached: {_shown(error)}"
            return (
                f"{self.repo_id!r} is neither a local folder ({Path(self.repo_id).absolute()}) nor in the hub cache "
                f"{where}{at}, or is there in part{reason}"
            )
        return f"{self.repo_id!r} could not be fetched from {page}: {_shown(error)}"


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise ConfigError(
            "model: names on the Hugging Face hub need the huggingface_hub package (pip install huggingface_hub); "
            "or give a local folder"
        ) from error
    return huggingface_hub


def _because_offline(hub: Any) -> str:
    return "; nothing was downloaded because HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else ""


def _shown(error: Exception) -> str:
    """The first line of what the library says, with its cause where that is the point."""
    text = " ".join(str(error.__cause__ or error).split())
    return f"{type(error.__cause__ or error).__name__}: {text[:300]}"


def _silent_bar(hub: Any) -> Callable[..., Any]:
    class Silent(hub.utils.tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent
