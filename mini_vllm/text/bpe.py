"""Byte-level BPE, trained and applied in plain Python: the real tokenizer's teaching double.

A text is bytes; the most frequent pair of neighbours becomes a new token, everywhere, and the count begins anew with
that token in place. `train_bpe` is handed texts and returns a `BPEVocabulary`, which encodes and decodes by the rank of
its merges and saves itself as a tokenizer.json giving the same ids. Promises: each merge is applied before the next is
chosen; a pair is counted as often as it can be merged ("aaaa" holds "aa" twice, not three times); of equally frequent
pairs the one with the lower ids goes first, so training is deterministic; and a merge touches only the places where
its pair stands, which makes training close to linear in the size of the text.

Source: Sennrich, Haddow and Birch 2016, "Neural Machine Translation of Rare Words with Subword Units"; bytes as the
alphabet, and the pattern, are GPT-2's. Splitting by the pattern is left to the `tokenizers` library: its classes of
characters (letters, numbers) are Unicode's, which Python's `re` does not have.
"""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tokenizers import Regex, pre_tokenizers

from mini_vllm.exceptions import InvalidParameterError
from mini_vllm.text.byte_level import GPT2_PATTERN

NUM_BYTES = 256
_NONE = -1

Pair = tuple[int, int]
Progress = Callable[[int, int], None]
"""Called with (tokens so far, tokens wanted)."""


@dataclass(frozen=True)
class BPEVocabulary:
    """tokens: bytes of each id, the 256 bytes first, then one for each union, in the order they were made.

    merges: (left id, right id) -> id of the union, best first. counts: how often each merge's pair stood in the
    training text when it was chosen. special_tokens: text -> id, above all others. pattern: how text is split into
    words that no token crosses; None does not split.
    """

    tokens: tuple[bytes, ...]
    merges: dict[Pair, int]
    counts: tuple[int, ...] = ()
    special_tokens: dict[str, int] = field(default_factory=dict)
    pattern: str | None = GPT2_PATTERN

    def __len__(self) -> int:
        return len(self.tokens) + len(self.special_tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens in it are taken as such."""
        ids: list[int] = []
        for part in _split_special(text, self.special_tokens):
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            else:
                for word in self._splitter(part):
                    ids += self._encode_word(word.encode("utf-8"))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no valid UTF-8 become U+FFFD. Raises `InvalidParameterError`."""
        texts = {token_id: text.encode("utf-8") for text, token_id in self.special_tokens.items()}
        unknown = [i for i in ids if not 0 <= i < len(self)]
        if unknown:
            raise InvalidParameterError("ids", f"must be below {len(self)}, the vocabulary's size; got {unknown[0]}")
        return b"".join(texts[i] if i in texts else self.tokens[i] for i in ids).decode("utf-8", errors="replace")

    @cached_property
    def _ranks(self) -> dict[Pair, int]:
        return {pair: rank for rank, pair in enumerate(self.merges)}

    @cached_property
    def _splitter(self) -> Callable[[str], list[str]]:
        return word_splitter(self.pattern)

    def _encode_word(self, word: bytes) -> list[int]:
        """Apply the best merge that applies anywhere, leftmost first, until none does."""
        chain = _Chain()
        chain.append_word(word, 1)
        ranks = self._ranks
        heap = [(ranks[pair], at) for at in range(len(word)) if (pair := chain.pair_at(at)) in ranks]
        heapq.heapify(heap)
        while heap:
            rank, at = heapq.heappop(heap)
            pair = chain.pair_at(at)
            if ranks.get(pair) != rank:  # a neighbour was merged away since
                continue
            chain.merge(at, self.merges[pair])
            for changed in (chain.before[at], at):
                if (new := ranks.get(chain.pair_at(changed))) is not None:
                    heapq.heappush(heap, (new, changed))
        return [symbol for symbol in chain.symbols if symbol != _NONE]


def train_bpe(
    corpus: Iterable[str],
    vocab_size: int,
    *,
    pattern: str | None = GPT2_PATTERN,
    special_tokens: Sequence[str] = (),
    progress: Progress | None = None,
) -> BPEVocabulary:
    """Learn merges until there are `vocab_size` tokens, the bytes and `special_tokens` included, or nothing to merge.

    corpus: texts; no token crosses the end of one, nor a special token in it. Raises `InvalidParameterError`.
    """
    _check(vocab_size, special_tokens)
    words = _count_words(corpus, word_splitter(pattern), special_tokens)
    trainer = BPETrainer(words)
    wanted = vocab_size - len(special_tokens)
    while len(trainer.tokens) < wanted and trainer.step():
        if progress is not None:
            progress(len(trainer.tokens), wanted)
    size = len(trainer.tokens)
    return BPEVocabulary(
        tokens=tuple(trainer.tokens),
        merges=trainer.merges,
        counts=tuple(trainer.counts),
        special_tokens={text: size + index for index, text in enumerate(special_tokens)},
        pattern=pattern,
    )


def build_bpe_vocab(corpus: str, vocab_size: int) -> tuple[dict[int, bytes], dict[Pair, int]]:
    """(id -> bytes, pair of ids -> id) of one text that is not split into words: the bare algorithm."""
    vocabulary = train_bpe([corpus], vocab_size, pattern=None)
    return dict(enumerate(vocabulary.tokens)), vocabulary.merges


def word_splitter(pattern: str | None) -> Callable[[str], list[str]]:
    """A function from a text to its words, which joined give the text."""
    if pattern is None:
        return lambda text: [text] if text else []
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # the Rust side raises a bare Exception
        raise InvalidParameterError("pattern", f"is no regular expression: {error}") from error
    return lambda text: [word for word, _ in split.pre_tokenize_str(text)]


class BPETrainer:
    """Training one merge at a time: `step` chooses the most frequent pair and merges it everywhere.

    words: each distinct word's bytes and how often it stands in the corpus.
    """

    def __init__(self, words: dict[bytes, int]) -> None:
        self.tokens = [bytes([value]) for value in range(NUM_BYTES)]
        self.merges: dict[Pair, int] = {}
        self.counts: list[int] = []
        self._ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        self._chain = _Chain()
        for word, count in words.items():
            self._chain.append_word(word, count)
        # How often each pair stands side by side. For two of the same that is more than can be merged: an upper bound.
        self._adjacent: Counter[Pair] = Counter()
        self._places: defaultdict[Pair, list[int]] = defaultdict(list)
        for at in range(len(self._chain.symbols)):
            if self._chain.after[at] != _NONE:
                self._add(at)
        self._heap = [(-count, pair) for pair, count in self._adjacent.items()]
        heapq.heapify(self._heap)

    def step(self) -> bool:
        """Learn one merge and apply it. False when no pair is left."""
        while self._heap:
            count, pair = heapq.heappop(self._heap)
            current = self._mergeable(pair)
            if current == 0:
                continue
            if current == -count:
                self._merge(pair, current)
                return True
            # Counts of old pairs only fall, so the entry was too high: put it where it belongs.
            heapq.heappush(self._heap, (-current, pair))
        return False

    def _mergeable(self, pair: Pair) -> int:
        """How often `pair` can be merged, counted without overlap."""
        if pair[0] != pair[1]:
            return self._adjacent[pair]
        total, taken = 0, _NONE
        for at in sorted(self._places[pair]):
            if at != taken and self._chain.pair_at(at) == pair:
                total += self._chain.weights[at]
                taken = self._chain.after[at]
            elif at == taken:
                taken = _NONE
        return total

    def _merge(self, pair: Pair, count: int) -> None:
        text = self.tokens[pair[0]] + self.tokens[pair[1]]
        union = self._ids.setdefault(text, len(self.tokens))  # the same bytes may be reached in two ways
        if union == len(self.tokens):
            self.tokens.append(text)
        if pair not in self.merges:
            self.merges[pair] = union
            self.counts.append(count)
        changed: set[Pair] = set()
        for at in sorted(self._places.pop(pair)):  # from left to right, so that "aaa" becomes "aa" + "a"
            if self._chain.pair_at(at) == pair:
                changed.update(self._merge_at(at, union))
        for new in changed:
            heapq.heappush(self._heap, (-self._adjacent[new], new))

    def _merge_at(self, at: int, union: int) -> Iterator[Pair]:
        """Merge the two symbols from `at`; yields the pairs that the union forms with its neighbours."""
        chain = self._chain
        before, second = chain.before[at], chain.after[at]
        for place in (before, at, second):
            if place != _NONE and chain.after[place] != _NONE:
                self._adjacent[chain.pair_at(place)] -= chain.weights[place]
        chain.merge(at, union)
        for place in (before, at):
            if place != _NONE and chain.after[place] != _NONE:
                yield self._add(place)

    def _add(self, at: int) -> Pair:
        pair = self._chain.pair_at(at)
        self._adjacent[pair] += self._chain.weights[at]
        self._places[pair].append(at)
        return pair


class _Chain:
    """Words as doubly linked symbols in flat lists; a merged pair's second place stays behind, empty."""

    def __init__(self) -> None:
        self.symbols: list[int] = []
        self.before: list[int] = []
        self.after: list[int] = []
        self.weights: list[int] = []

    def append_word(self, word: bytes, weight: int) -> None:
        if not word:
            return
        start, end = len(self.symbols), len(self.symbols) + len(word)
        self.symbols += word
        self.before += [_NONE, *range(start, end - 1)]
        self.after += [*range(start + 1, end), _NONE]
        self.weights += [weight] * len(word)

    def pair_at(self, at: int) -> Pair:
        """The symbol at a place and the one after it; `_NONE` where there is none."""
        after = self.after[at]
        return (self.symbols[at], self.symbols[after]) if at != _NONE and after != _NONE else (_NONE, _NONE)

    def merge(self, at: int, union: int) -> None:
        gone = self.after[at]
        following = self.after[gone]
        self.symbols[at], self.symbols[gone] = union, _NONE
        self.after[at], self.after[gone] = following, _NONE
        if following != _NONE:
            self.before[following] = at


def _check(vocab_size: int, special_tokens: Sequence[str]) -> None:
    least = NUM_BYTES + len(special_tokens)
    if vocab_size < least:
        raise InvalidParameterError("vocab_size", f"must be at least {least} (256 bytes and the special tokens)")
    if len(set(special_tokens)) != len(special_tokens) or not all(special_tokens):
        raise InvalidParameterError("special_tokens", f"must be distinct and not empty, got {list(special_tokens)}")


def _count_words(
    corpus: Iterable[str], split: Callable[[str], list[str]], special_tokens: Sequence[str]
) -> dict[bytes, int]:
    counts: Counter[str] = Counter()
    for text in corpus:
        for part in _split_special(text, special_tokens):
            if part not in special_tokens:
                counts.update(split(part))
    return {word.encode("utf-8"): count for word, count in counts.items()}


def _split_special(text: str, special_tokens: Iterable[str]) -> list[str]:
    """`text` cut before and after each special token, the longest of those that begin at one place."""
    ordered = sorted(special_tokens, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, ordered)) + ")", text) if ordered else [text]
    return [part for part in parts if part]
