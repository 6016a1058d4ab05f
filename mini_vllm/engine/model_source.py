"""Where a model's files are: a local folder or GGUF file, or a repository of the hub brought into its cache.

`ModelSource` is handed what the user wrote and resolves it once, so that config, tokenizer and weights come from the
same commit. A local path goes before a hub repository of the same name. Raises `CheckpointError` saying what was tried.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mini_vllm.exceptions import CheckpointError, ConfigError
from mini_vllm.hub import HubName, HubSnapshot, parse_hub_name
from mini_vllm.logger import init_logger

logger = init_logger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """A model or tokenizer as named by the argument `field`.

    name: a path or hub name. load_format: as in `LoadConfig`. revision, download_dir, use_tqdm: for hub names.
    """

    name: str
    field: str = "model"
    load_format: str = "auto"
    revision: str | None = None
    download_dir: str | None = None
    use_tqdm: bool = True

    @cached_property
    def path(self) -> Path:
        """The folder (with config.json) or the GGUF file. What describes the model is there; weights may not be yet."""
        if self.hub_name is None:
            return self._local_path()
        if self._wants_gguf_of_hub():
            from mini_vllm.hub import fetch_gguf

            return fetch_gguf(self._snapshot, self.hub_name.quant, self.use_tqdm)
        return self._checked(self._snapshot.folder)

    @cached_property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file."""
        from mini_vllm.gguf.reader import is_gguf_path

        if self.hub_name is None:
            return self.load_format == "gguf" or is_gguf_path(self.name)
        return self._wants_gguf_of_hub()

    @property
    def is_on_hub(self) -> bool:
        return self.hub_name is not None

    def fetch_weights(self) -> None:
        """Bring the weights, where they are not there already."""
        if self.hub_name is not None and not self.is_gguf:
            from mini_vllm.hub import fetch_weights

            fetch_weights(self._snapshot, self.use_tqdm)

    @cached_property
    def hub_name(self) -> "HubName | None":
        """The hub's name of the model; None for what is, or can only be, a local path."""
        if self._is_local():
            return None
        name = parse_hub_name(self.name)
        if name is not None and name.quant is not None and self.load_format == "safetensors":
            raise ConfigError(f"load_format: {self.name!r} names a GGUF file; use load_format='gguf' or 'auto'")
        return name

    def _is_local(self) -> bool:
        exists = Path(self.name).expanduser().exists()
        if exists and self.revision is not None:
            argument = "tokenizer_revision" if self.field == "tokenizer" else "revision"
            raise ConfigError(
                f"{argument}: {self.revision!r} is for repositories of the hub, but {self.name!r} is a local path"
            )
        if exists and "/" in self.name and parse_hub_name(self.name) is not None:
            logger.info("%s: %s is the local folder of that name, not a repository of the hub", self.field, self.name)
        return exists or self.name.endswith(".gguf")

    @cached_property
    def _snapshot(self) -> "HubSnapshot":
        from mini_vllm.hub import fetch_snapshot

        assert self.hub_name is not None
        return fetch_snapshot(
            self.hub_name.repo_id, self.revision, self.download_dir, field=self.field, use_tqdm=self.use_tqdm
        )

    def _wants_gguf_of_hub(self) -> bool:
        """By its name, by the format asked for, or because there is no config.json but GGUF files."""
        from mini_vllm.hub import has_gguf

        assert self.hub_name is not None
        if self.load_format == "gguf" or self.hub_name.quant is not None:
            return True
        return not (self._snapshot.folder / "config.json").is_file() and has_gguf(self._snapshot)

    def _local_path(self) -> Path:
        path = Path(self.name).expanduser()
        if self.is_gguf:
            from mini_vllm.gguf.reader import resolve_gguf_path

            if self.load_format == "safetensors":
                raise ConfigError(f"load_format: {self.name!r} is a GGUF file; use load_format='gguf' or 'auto'")
            return resolve_gguf_path(self.name)
        return self._checked(path)

    def _checked(self, folder: Path) -> Path:
        """A tokenizer needs no config.json, and says itself which of its files are missing."""
        return folder if self.field == "tokenizer" and folder.is_dir() else require_model_folder(self.field, folder)


def require_model_folder(field: str, folder: Path) -> Path:
    """`folder`, if it is one and has a config.json."""
    if not folder.is_dir():
        kind = "is a file; a folder is needed" if folder.exists() else "is no local folder, and no name on the hub"
        raise CheckpointError(
            f"{field}: {str(folder)!r} {kind}. Give a folder with config.json and *.safetensors, a .gguf file, or a "
            "name such as org/name of the Hugging Face hub"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{field}: {folder} has no config.json, so it is no model checkpoint")
    return folder
