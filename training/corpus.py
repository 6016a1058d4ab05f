"""The training corpus: the sources of the running Python's standard library.

This module decides which files belong to the corpus, removes duplicates, and
splits the rest into a training and a held-out part *by file*, so that no
held-out document was seen in training. The split depends only on a hash of the
relative path: the same Python version gives the same split on every machine.
Files that carry a licence or copyright statement of their own are left out, so
that what remains is covered by the Python Software Foundation licence.

Run it to write the manifest (every path with its SHA-256, size and split):

    python training/corpus.py --out mini_vllm/assets/stdlib-llama-3.7m/corpus_manifest.json
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXCLUDED_DIRS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "site-packages", "__pycache__"}
)
# Build configuration of one machine (paths, compiler flags), not library code.
EXCLUDED_NAMES = re.compile(r"_sysconfigdata_.*\.py")
OWN_LICENCE = re.compile(r"Copyright|Licen[cs]e")
HELD_OUT_PERCENT = 3
# Chosen, before any training, so that the held-out files are of many kinds: with the
# bare hash one alias table (`locale.py`) was over half of their text.
SPLIT_SALT = "mini_vllm-6/"


@dataclass(frozen=True)
class Document:
    """One source file: `path` is relative to the library, in POSIX form.

    `sha256` is that of the file on disk; `text` is what the model is trained on.
    """

    path: str
    sha256: str
    text: str
    held_out: bool

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode("utf-8"))


def stdlib_root() -> Path:
    """Return the directory of the running Python's library sources."""
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(relative_path: str, percent: int = HELD_OUT_PERCENT) -> bool:
    """Decide the split from the path alone, so that edits elsewhere never move a file."""
    digest = hashlib.sha256((SPLIT_SALT + relative_path).encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent


def candidate_paths(root: Path) -> Iterator[Path]:
    """Yield the `.py` files of `root` in sorted order, without the excluded parts."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not EXCLUDED_DIRS.intersection(parts) and not EXCLUDED_NAMES.fullmatch(path.name):
            yield path


def topics_as_prose(source: str) -> str:
    """Turn `pydoc_data/topics.py`, one big dict of strings, into the prose it holds."""
    topics: dict[str, str] = ast.literal_eval(source.partition("topics = ")[2])
    return "\n\n".join(text.strip("\n") for text in topics.values()) + "\n"


def read_source(path: Path) -> str | None:
    """Return the text of a file, or None when it may not or cannot be used."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    if not text.strip() or OWN_LICENCE.search(text):
        return None
    return topics_as_prose(text) if path.parts[-2:] == ("pydoc_data", "topics.py") else text


def load_corpus(root: Path | None = None) -> list[Document]:
    """Return the documents in path order; of files with equal text the first one stays."""
    root = root or stdlib_root()
    seen: set[str] = set()
    documents = []
    for path in candidate_paths(root):
        text = read_source(path)
        if text is None:
            continue
        if text not in seen:
            seen.add(text)
            name = path.relative_to(root).as_posix()
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            documents.append(Document(name, digest, text, is_held_out(name)))
    return documents


def split_corpus(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Return (training, held-out) documents."""
    return [d for d in documents if not d.held_out], [d for d in documents if d.held_out]


def manifest(documents: list[Document]) -> dict[str, object]:
    """Describe the corpus completely enough to rebuild and check it."""
    train, held_out = split_corpus(documents)
    return {
        "source": "Python standard library",
        "python_version": platform.python_version(),
        "excluded_directories": sorted(EXCLUDED_DIRS),
        "excluded_text_pattern": OWN_LICENCE.pattern,
        "held_out_percent": HELD_OUT_PERCENT,
        "split_salt": SPLIT_SALT,
        "train": {"files": len(train), "bytes": sum(d.num_bytes for d in train)},
        "held_out": {"files": len(held_out), "bytes": sum(d.num_bytes for d in held_out)},
        "files": [
            {
                "path": d.path,
                "sha256": d.sha256,
                "bytes": d.num_bytes,
                "split": "held_out" if d.held_out else "train",
            }
            for d in documents
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="manifest file to write (JSON)")
    args = parser.parse_args()
    summary = manifest(load_corpus())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in summary.items() if k != "files"}))


if __name__ == "__main__":
    main()
