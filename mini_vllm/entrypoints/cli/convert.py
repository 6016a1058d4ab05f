"""`mini-vllm convert`: pickled weights (`pytorch_model.bin`) to safetensors, which are what the engine loads."""

import argparse
import re
from pathlib import Path
from typing import Any

from mini_vllm.entrypoints.cli.arguments import HelpFormatter
from mini_vllm.exceptions import ConfigError
from mini_vllm.hub import fetch_pickles, fetch_snapshot, parse_hub_name

_EXAMPLES = """\
examples:
  mini-vllm convert opt-125m opt-125m-safetensors
  mini-vllm convert opt-125m opt-125m                   safetensors beside the old weights
  mini-vllm convert facebook/opt-125m opt-125m          a repository of the Hugging Face hub
  mini-vllm convert DIR NEW_DIR --max-shard-size 2GiB   smaller files
"""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="turn pytorch_model.bin into safetensors",
        description="Turn pickled weights into safetensors and copy config and tokenizer beside them. Nothing but "
        "tensors is taken out of the pickle: one that asks for anything else is refused and none of it runs.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="Folder with pytorch_model.bin, or its shards and their index; or the hub's name of such a model.",
    )
    parser.add_argument("target", metavar="DST", help="Folder to write; may be SRC.")
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="Largest file to write, such as 5GB or 500MiB. Default: 5GB.",
    )
    parser.add_argument("--revision", metavar="NAME", help="Branch, tag or commit of a model on the hub.")
    parser.add_argument("--download-dir", metavar="DIR", help="Where models of the hub are kept.")
    parser.add_argument("--force", action="store_true", help="Replace files that are in DST already.")
    parser.add_argument("-v", "--verbose", action="store_true", help="Show the log on standard error.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    max_shard_bytes = parse_shard_size(args.max_shard_size)
    source, target = find_source(args.source, args.revision, args.download_dir), Path(args.target).expanduser()

    from mini_vllm.models.pickle_convert import convert_folder

    done = convert_folder(source, target, max_shard_bytes=max_shard_bytes, force=args.force, use_tqdm=True)
    files = f"{len(done.files)} files" if len(done.files) > 1 else done.files[0]
    print(f"{done.num_tensors} tensors, {done.total_bytes / 10**6:,.1f} MB, written to {files} in {target}")
    for alias, name in done.dropped.items():
        print(f"left out {alias}: tied to {name}")
    if done.copied:
        print(f"copied {', '.join(done.copied)}")
    print(f"try it: mini-vllm generate --model {target} --prompt 'Hello'")
    return 0


def find_source(name: str, revision: str | None, download_dir: str | None) -> Path:
    """The local folder `name`, else its repository's folder in the hub's cache, with the pickles fetched."""
    hub_name = None if (folder := Path(name).expanduser()).exists() else parse_hub_name(name)
    if hub_name is None or hub_name.quant is not None:
        if revision is not None:
            raise ConfigError(f"revision: {revision!r} is for repositories of the hub, but {name!r} is a local path")
        return folder
    snapshot = fetch_snapshot(hub_name.repo_id, revision, download_dir, field="source")
    fetch_pickles(snapshot)
    return snapshot.folder


def parse_shard_size(text: str) -> int:
    """Bytes of '5GB' (5 x 10^9) or '500MiB' (500 x 2^20). Raises `ConfigError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS or not (size := int(float(match[1]) * _UNITS[match[2].upper()])):
        raise ConfigError(f"max_shard_size: must be a size such as 5GB or 500MiB, got {text!r}")
    return size
