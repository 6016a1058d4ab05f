"""Token ids become text as they arrive, one request at a time.

`IncrementalDetokenizer.update` is handed new ids and returns the text that became certain. It never returns half a
character, never takes back what it returned, and what it returned by `flush` adds up to the decoding of all ids.

`tokenizers.DecodeStream` does the common part in Rust. It keeps unfinished bytes for ever, has no flush, and fails
on ids after which the earlier text decodes differently; so the window it decodes is kept here as well, and a request
that meets such ids goes on with the window alone. The window is the ids since the last but one point at which the text
was complete: the older half gives the newer half its context (some decoders treat the first token differently).
"""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from mini_vllm.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_HELD = 16
"""Ids kept back before looking for a point at which bytes are certainly broken rather than unfinished."""
_CONTEXT_LENGTHS = range(4, 24)


class IncrementalDetokenizer:
    """The text of one request's output so far, in `text`.

    prompt_token_ids: gives the first output token its context, as a decoder that drops a leading space needs.
    spaces_between_special_tokens: False leaves out what a decoder puts between two added tokens in a row.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._backend = tokenizer.backend
        self._skip = skip_special_tokens
        self._special = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        self._window = self._context(prompt_token_ids)
        self._held = 0  # ids at the window's end whose text is not certain yet
        self._prefix = ""  # text of the ids before those; kept only once the stream is left
        self._stream: DecodeStream | None = DecodeStream(ids=self._window, skip_special_tokens=skip_special_tokens)
        self._pieces: list[str] = []
        self._unspaced: dict[int, str] = {}
        self._last_unspaced = False
        if not (skip_special_tokens or spaces_between_special_tokens):
            added = tokenizer.backend.get_added_tokens_decoder()
            self._unspaced = {token_id: token.content for token_id, token in added.items()}

    @property
    def text(self) -> str:
        """All text returned so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def update(self, token_ids: Sequence[int]) -> str:
        """Take new ids; return the text that became certain (possibly none)."""
        push = self._push_unspaced if self._unspaced else self._push
        new = push(token_ids[0]) if len(token_ids) == 1 else "".join(map(push, token_ids))
        if new:
            self._pieces.append(new)
        return new

    def flush(self) -> str:
        """No more ids will come: return what was kept back, broken bytes as U+FFFD."""
        if not self._held:
            return ""
        self._leave_stream()
        rest = self._text_of(self._window)[len(self._prefix) :]
        self._window, self._held, self._prefix = [], 0, ""
        if rest:
            self._pieces.append(rest)
        return rest

    def _text_of(self, token_ids: Sequence[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=self._skip)
        return text

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The shortest end of the prompt (4 to 23 ids) that is whole characters; none if there is no such."""
        for length in _CONTEXT_LENGTHS:
            context = list(prompt_token_ids[-length:])
            if _REPLACEMENT not in self._text_of(context):
                return context
            if length >= len(prompt_token_ids):
                break
        return []

    def _push(self, token_id: int) -> str:
        if token_id in self._special:
            return ""  # it has no text, and in the window it would only push context out
        self._window.append(token_id)
        self._held += 1
        if self._stream is None or self._held >= _MAX_HELD:
            return self._push_by_window()
        try:
            piece: str | None = self._stream.step(self._backend, token_id)
        except Exception:  # what it raises has no type of its own: earlier text would change
            return self._push_by_window()
        if piece is None:
            return ""
        del self._window[: -self._held]
        self._held = 0
        return piece

    def _push_unspaced(self, token_id: int) -> str:
        """As `_push`, but an added token right after another is its own text alone."""
        piece, content = self._push(token_id), self._unspaced.get(token_id)
        if content is not None and self._last_unspaced and piece:
            piece = content
        self._last_unspaced = content is not None
        return piece

    def _push_by_window(self) -> str:
        self._leave_stream()
        text = self._text_of(self._window)
        if text.endswith(_REPLACEMENT):
            return self._release() if self._held % _MAX_HELD == 0 else ""
        new = text[len(self._prefix) :]
        if new:
            self._slide(self._held)
        return new

    def _leave_stream(self) -> None:
        if self._stream is not None:
            self._stream = None
            self._prefix = self._text_of(self._window[: -self._held])

    def _slide(self, keep: int) -> None:
        """Keep the newest `keep` ids as the context of those to come."""
        self._window = self._window[-keep:]
        self._prefix = self._text_of(self._window)
        self._held = 0

    def _release(self) -> str:
        """Return the part of a long kept-back run that no later id can change.

        Decoding the two sides of a cut separately gives the whole only if no character straddles the cut; as
        bytes follow on the right, that stays so.
        """
        whole = self._text_of(self._window)
        for right in range(1, self._held):
            left, rest = self._window[:-right], self._window[-right:]
            left_text, rest_text = self._text_of(left), self._text_of(rest)
            if rest_text and left_text + rest_text == whole:
                new = left_text[len(self._prefix) :]
                self._window, self._held, self._prefix = rest, right, ""
                return new
        return ""
