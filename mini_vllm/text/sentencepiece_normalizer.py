"""What SentencePiece does to text before it looks for pieces, exactly.

Its rules (a table of replacements such as NFKC's, white space made single, a space put first, spaces made visible as
U+2581) look at a whole text at once and leave user-defined symbols alone. The `tokenizers` library's normalisers see
the stretches between added tokens one by one and match the table by grapheme, which gives other ids for some texts;
therefore the text is prepared here, and the `tokenizers.Tokenizer` behind it only looks for pieces.

`SentencePieceNormalizer` is handed the model, and the tokens that are matched as they stand; it promises the string
in which the `sentencepiece` library looks for pieces. A control token in the text, which that library has no notion
of, ends one text and begins another.
"""

import re
import struct
from collections.abc import Collection, Iterable, Iterator

from tokenizers import AddedToken

from mini_vllm.text.sentencepiece import SentencePieceModel

VISIBLE_SPACE = "\u2581"

_WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)
"""Unicode's White_Space property, which lstrip and rstrip of added tokens go by; str.strip() takes a few more."""

_MAX_RULE_BYTES = 256
"""No published table has a rule for more than a few characters; a hostile one must not read to the text's end."""


class SentencePieceNormalizer:
    """Callable: the text of a prompt -> the text in which pieces are looked for.

    added: all added tokens of the tokenizer, special or not. user_defined: those of them that the model itself
    lists as symbols, which may stand within a text. prefix_every_text: whether the space that is put first also goes
    after each control token (`legacy` in tokenizer_config.json), or only before what the prompt begins with.
    """

    def __init__(
        self,
        model: SentencePieceModel,
        added: Iterable[AddedToken],
        user_defined: Collection[str],
        *,
        add_dummy_prefix: bool,
        prefix_every_text: bool,
    ) -> None:
        added = list(added)
        self._boundaries = _TokenFinder(token for token in added if token.content not in user_defined)
        self._symbols = _TokenFinder(token for token in added if token.content in user_defined)
        self._charsmap = PrecompiledCharsmap(model.precompiled_charsmap) if model.precompiled_charsmap else None
        self._remove_extra = model.remove_extra_whitespaces
        self._space = VISIBLE_SPACE if model.escape_whitespaces else " "
        self._prefix = add_dummy_prefix
        self._prefix_every_text = prefix_every_text

    def __call__(self, text: str) -> str:
        parts: list[str] = []
        start = 0
        for at, token in self._boundaries.find(text):
            if at < start:  # within the white space that the token before swallows
                continue
            # White space to be swallowed stays as it is: the library, which sees the token next, does that.
            end_of_text = len(text[start:at].rstrip(_WHITE_SPACE)) + start if token.lstrip else at
            parts.append(self._text(text[start:end_of_text], start))
            start = at + len(token.content)
            if token.rstrip:
                start = len(text) - len(text[start:].lstrip(_WHITE_SPACE))
            parts.append(text[end_of_text:start])
        parts.append(self._text(text[start:], start))
        return "".join(parts)

    def _text(self, text: str, start: int) -> str:
        return self._normalize(text, self._prefix and (start == 0 or self._prefix_every_text))

    def _normalize(self, text: str, prefix: bool) -> str:
        if not text:
            return ""
        text = self._replaced(text)
        if self._remove_extra:
            text = re.sub(" {2,}", " ", text).strip(" ")
            if not text:
                return ""
        text = (" " + text if prefix else text).replace(" ", self._space)
        return text.rstrip(self._space) if self._remove_extra else text

    def _replaced(self, text: str) -> str:
        """The table's replacements, except in user-defined symbols."""
        if self._charsmap is None:
            return text
        parts: list[str] = []
        start = 0
        for at, symbol in self._symbols.find(text):
            parts += (self._charsmap.replace(text[start:at]), symbol.content)
            start = at + len(symbol.content)
        return "".join([*parts, self._charsmap.replace(text[start:])])


class _TokenFinder:
    """Where tokens stand in a text: leftmost first, and of those that begin at one place the longest.

    Vocabularies have thousands of them, mostly beginning alike ("<unused17>"), so a place costs one look-up for each
    length of token that its first character can begin, not one comparison for each token.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens}
        lengths: dict[str, set[int]] = {}
        for content in self._tokens:
            lengths.setdefault(content[0], set()).add(len(content))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile("[" + "".join(map(re.escape, lengths)) + "]") if lengths else None

    def find(self, text: str) -> Iterator[tuple[int, AddedToken]]:
        """(position, token) of each one in `text`, from left to right, without overlap."""
        if self._first is None:
            return
        position = 0
        while match := self._first.search(text, position):
            start = match.start()
            candidates = (text[start : start + length] for length in self._lengths[match.group()])
            token = next((self._tokens[content] for content in candidates if content in self._tokens), None)
            position = start + (1 if token is None else len(token.content))
            if token is not None and not (token.single_word and _touches_a_word(text, start, position)):
                yield start, token


def _touches_a_word(text: str, start: int, end: int) -> bool:
    return bool(re.match(r"\w", text[start - 1 : start]) or re.match(r"\w", text[end : end + 1]))


class PrecompiledCharsmap:
    """The table of replacements: a double-array trie over the UTF-8 bytes of what is replaced, the longest first.

    Layout: the trie's size in bytes (uint32), its units (uint32 each, little-endian), then the replacements, each
    ended by a zero byte. Units are those of Darts-clone: bits 0-7 label, bit 8 "has a value", bits 10-30 offset
    (times 256 with bit 9), bit 31 "is a value". Indices outside the array mean that there is no rule.
    """

    def __init__(self, data: bytes) -> None:
        size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
        count = min(size, len(data) - 4) // 4 if len(data) >= 4 else 0
        self._units = struct.unpack_from(f"<{count}I", data, 4) if count else ()
        self._texts = data[4 + size :]
        self._root = _offset(self._units[0]) if self._units else 0

    def replace(self, text: str) -> str:
        """`text` with every stretch that has a rule replaced, from left to right."""
        data = text.encode("utf-8")
        out: list[bytes] = []
        copied = position = 0
        while position < len(data):
            length, value = self._longest(data, position)
            if length:
                out += (data[copied:position], self._texts[value : self._texts.find(b"\0", value)])
                position += length
                copied = position
            else:
                position += 1
                while position < len(data) and data[position] & 0xC0 == 0x80:  # the rest of the character
                    position += 1
        out.append(data[copied:])
        return b"".join(out).decode("utf-8", errors="replace")

    def _longest(self, data: bytes, start: int) -> tuple[int, int]:
        """Bytes of the longest rule that matches at `start` and where its replacement is; (0, 0) if none does."""
        units, size = self._units, len(self._units)
        node = self._root
        found = (0, 0)
        for position in range(start, min(len(data), start + _MAX_RULE_BYTES)):
            node ^= data[position]
            if node >= size or units[node] & 0x800000FF != data[position]:
                break
            unit = units[node]
            node ^= _offset(unit)
            if unit & 0x100 and node < size:
                found = (position + 1 - start, units[node] & 0x7FFFFFFF)
        return found


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)
