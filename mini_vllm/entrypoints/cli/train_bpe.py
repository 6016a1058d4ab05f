"""`mini-vllm train-bpe`: learn a byte-level BPE tokenizer from text files and write it as tokenizer.json."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mini_vllm.entrypoints.cli.arguments import HelpFormatter
from mini_vllm.exceptions import ConfigError

_EXAMPLES = """\
examples:
  mini-vllm train-bpe corpus.txt --vocab-size 2048 --output my-tokenizer
  mini-vllm train-bpe src/*.py --vocab-size 4096 --output DIR --special-token '<|endoftext|>'
  mini-vllm train-bpe README.md --vocab-size 512 --output DIR --pattern none --show-merges 20
"""
_BLOCK_CHARS = 1 << 20


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train-bpe",
        help="learn a tokenizer from text files",
        description="Learn a byte-level BPE tokenizer by merging the most frequent pairs, in plain Python, and write "
        "it as tokenizer.json (and vocab.json with merges.txt).",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text to learn from.")
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="Tokens in all, 256 bytes and specials included."
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="Folder to write; made if it is not there.")
    parser.add_argument(
        "--pattern", choices=("gpt2", "qwen2", "none"), default="gpt2",
        help="How text is split into words that no token crosses. Default: gpt2.",
    )  # fmt: skip
    parser.add_argument(
        "--special-token", action="append", default=[], metavar="TEXT", help="A token of its own; may be repeated."
    )
    parser.add_argument(
        "--show-merges", type=int, default=0, metavar="N", help="Print the first N merges and their counts."
    )
    parser.add_argument("--force", action="store_true", help="Replace a tokenizer that is in DIR already.")
    parser.add_argument("-v", "--verbose", action="store_true", help="Show the log on standard error.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mini_vllm.text.bpe import BPEVocabulary, train_bpe
    from mini_vllm.text.bpe_files import TOKENIZER_FILE, save_bpe
    from mini_vllm.text.byte_level import GPT2_PATTERN, QWEN2_PATTERN

    output = Path(args.output).expanduser()
    if (output / TOKENIZER_FILE).exists() and not args.force:
        raise ConfigError(f"output: {output} has a {TOKENIZER_FILE} already; --force replaces it")
    pattern = {"gpt2": GPT2_PATTERN, "qwen2": QWEN2_PATTERN, "none": None}[args.pattern]
    with tqdm(desc="learning", unit=" tokens", disable=None, leave=False) as bar:

        def show(done: int, wanted: int) -> None:
            bar.total = wanted
            bar.update(done - bar.n)

        vocabulary: BPEVocabulary = train_bpe(
            _blocks(args.files), args.vocab_size, pattern=pattern, special_tokens=args.special_token, progress=show
        )
    written = save_bpe(vocabulary, output)
    for (left, right), count in list(zip(vocabulary.merges, vocabulary.counts, strict=True))[: args.show_merges]:
        print(f"{count:>10}  {_shown(vocabulary.tokens[left])} + {_shown(vocabulary.tokens[right])}")
    if len(vocabulary) < args.vocab_size:
        print(f"only {len(vocabulary)} tokens: nothing is left to merge in this text", file=sys.stderr)
    print(
        f"{len(vocabulary)} tokens, {len(vocabulary.merges)} merges: {', '.join(f.name for f in written)} in {output}"
    )
    return 0


def _shown(token: bytes) -> str:
    return repr(token.decode("utf-8")) if token.decode("utf-8", errors="ignore").encode() == token else repr(token)


def _blocks(paths: list[str]) -> Iterator[str]:
    """The files' texts in blocks of about a million characters, cut after a line."""
    for path in paths:
        try:
            with open(path, encoding="utf-8", newline="") as file:
                while block := file.read(_BLOCK_CHARS):
                    yield block + file.readline()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"files: cannot read {path!r}: {error}") from error
