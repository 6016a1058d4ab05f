"""How byte-level BPE tokenizers split text into words before they merge, by the name GGUF files give it.

The file holds a name only; the pattern behind it is the one in the tokenizer.json of the models it stands for. Names
that several families share are listed with the pattern they have in common.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from mini_vllm.gguf.metadata import Metadata
from mini_vllm.logger import init_logger

logger = init_logger(__name__)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+CONTRACTION|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*CONTRACTION|\p{N}{DIGITS}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True)
class Splitting:
    """patterns: applied one after the other, each splitting what the one before left whole.

    ignore_merges: a word that is a token is taken as it is. adds_bos: a text begins with BOS unless the file says
    otherwise. normal_form: Unicode normalisation before all else.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    normal_form: str | None = None

    def pre_tokenizer(self) -> Any:
        splits: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PLAIN = Splitting((_GPT2,))
_DIGIT_BY_DIGIT = Splitting((r"\p{N}", _GPT2))
_LLAMA3 = Splitting((_CL100K.replace("{DIGITS}", "{1,3}"),), ignore_merges=True, adds_bos=True)
_SPLITTINGS: dict[tuple[str, ...], Splitting] = {
    ("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat"): _PLAIN,
    ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"): _DIGIT_BY_DIGIT,
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"): _LLAMA3,
    ("dbrx", "smaug-bpe"): Splitting(_LLAMA3.patterns),
    ("qwen2", "deepseek-r1-qwen"): Splitting((_CL100K.replace("{DIGITS}", ""),), normal_form="NFC"),
    ("stablelm2",): Splitting((_CL100K.replace("{DIGITS}", ""),)),
    ("tekken",): Splitting((_CASED_WORDS.replace("CONTRACTION", "").replace("{DIGITS}", ""),), ignore_merges=True),
    ("gpt-4o", "llama4"): Splitting((_CASED_WORDS.replace("CONTRACTION", _CONTRACTION).replace("{DIGITS}", "{1,3}"),)),
}
SPLITTINGS = {name: splitting for names, splitting in _SPLITTINGS.items() for name in names}


def find_splitting(metadata: Metadata, *, quiet: bool = False) -> Splitting:
    """The one the file names. An unknown name, or none, falls back to GPT-2's and says so."""
    name = metadata.string("tokenizer.ggml.pre", "")
    if name not in SPLITTINGS and not quiet:
        problem = f"names the unknown pre-tokenizer {name!r}" if name else "names no pre-tokenizer"
        logger.warning(
            "%s: tokenizer.ggml.pre %s; GPT-2's is used, so some texts may be split differently than in training. If "
            "you have the model's tokenizer.json, pass its folder as the tokenizer (--tokenizer DIR)",
            metadata.file.path.name, problem,
        )  # fmt: skip
    return SPLITTINGS.get(name, _PLAIN)
