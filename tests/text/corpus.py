"""Text of every sort for comparing tokenizers: a fixed corpus, and a strategy that makes more of it."""

import functools
import random
import unicodedata

from hypothesis import strategies as st

_SAMPLES = (
    "The quick brown fox jumps over the lazy dog. It's the 21st-century; we'll see, they've said, I'M SURE!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Århus, Łódź, İstanbul, ŞŞ ẞ ß ﬁ ﬂ Ǆ ŉ",
    "Съешь же ещё этих мягких французских булок. Ψάθα η πανώλη, αφού ΐΰ. Հայերեն ქართული",
    "東京都は日本の首都です。カタカナ ｶﾀｶﾅ ガ が 中文字符，測試。한국어 조선말 한글 각",
    "هذا نص عربي مع تشكيل: مُحَمَّدٌ ﷺ ﻻ، שָׁלוֹם עוֹלָם \u202eRTL\u202c \u2067x\u2069 ܐܪܡܝܐ",
    "हिन्दी क्षत्रिय ज़ॉ தமிழ் கொ ไทยกำลัง ภาษา မြန်မာ ខ្មែរ བོད་ཡིག አማርኛ ᠮᠣᠩᠭᠣᠯ ᏣᎳᎩ ᚠᚢᚦ 𐍈𐌰 𓀀𒀀 𝕳𝖊𝖑𝖑𝖔 𝟘𝟙",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷🇯🇵 1️⃣ ❤️ ☠︎ 🧑🏿‍🚀 \U0001f3fb \u200d \ufe0f",
    "e\u0301 é E\u0301\u0323 a\u0300\u0301\u0302\u0303\u0304 q\u0307\u0323 Z͑ͫ̓͊̂a̴l̷g̶o̵ \u1100\u1161\u11a8 \u0e33 ｆｕｌｌ",
    "½ ⅷ ² ㎏ ℡ ﷽ Å Å",
    "x  y   z    \t\t tab\r\n\r\nline\n\n\n   indented\n\t\tdef\u00a0nbsp",
    "x\u2003em\u3000wide\u2028ls\u2029ps\x85nel\u200bzw ",
    " " * 1 + "one" + " " * 17 + "seventeen" + "\n" * 9 + "\t" * 5 + " \n \n  end  ",
    "0 1 12 123 1234 12345678901234567890 3.14159 1e-10 0xFF 1,000,000 ٣٤٥ ４５６ ⅻ 𝟗",
    'def f(x: int) -> str:\n    return f"{x!r}"  # naïve\n\nfor (let i=0;i<n;++i) { a[i] += b[i]*2; }',
    "<p>\n<a href='x'>&amp;</a>",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31m\x1c\x1d\x1f\x7f\x80\x9f\ufeff\ufffd\ufffe\uffff\U000e0001\U0010ffff\xad",
    "<s></s> <unk> <pad> <|endoftext|> <|im_start|>user <|im_end|> <mask>x <0x41> <0xE2><0x96> [INST] ▁▁ ▁a",
    "aaaaaaaaaaaaaaaaaaaa abababababab ''''' \"\"\"\" ------ ====== ???!!! ...... \\\\n //// ___ 'S 'Ll 'd've",
    "",
    " ",
    "a",
    "\n",
    "  leading",
    "trailing  ",
)


def _random_text(rng: random.Random, length: int) -> str:
    """Characters of all planes that have a category, in runs of the same block, as real texts are."""
    out: list[str] = []
    while len(out) < length:
        base = rng.choice(
            (0x20, 0x80, 0x300, 0x400, 0x600, 0x900, 0x1100, 0x2000, 0x3000, 0x4E00, 0xAC00, 0xF900, 0x1F300)
        )
        for _ in range(rng.randint(1, 8)):
            char = chr(base + rng.randint(0, 0x1FF))
            if unicodedata.category(char) not in ("Cs", "Cn"):
                out.append(char)
        if rng.random() < 0.3:
            out.append(rng.choice((" ", "  ", "\n", "\t", "'s ", "12 ", ". ")))
    return "".join(out)


@functools.cache
def corpus() -> tuple[str, ...]:
    """The samples, their pieces and joinings, random Unicode, and random bytes read as UTF-8 and as Latin-1."""
    rng = random.Random(20)
    texts = [*_SAMPLES, *(word for sample in _SAMPLES for word in sample.split(" "))]
    for _ in range(150):
        first, second = rng.choice(_SAMPLES), rng.choice(_SAMPLES)
        texts.append(first[rng.randint(0, len(first)) :] + second[: rng.randint(0, len(second))])
    texts += [_random_text(rng, rng.randint(1, 60)) for _ in range(250)]
    for _ in range(60):
        raw = rng.randbytes(rng.randint(1, 40))
        texts += [raw.decode("utf-8", errors="replace"), raw.decode("latin-1")]
    return tuple(dict.fromkeys(texts))


def texts(*extra: str) -> st.SearchStrategy[str]:
    """Any text, scraps of the corpus, or `extra` words such as special tokens, strung together."""
    scraps = st.sampled_from([scrap for sample in _SAMPLES for scrap in sample.split(" ")] + list(extra))
    spaces = st.sampled_from(["", " ", "  ", "\n", "\t", " " * 9, "\u00a0", "\r\n"])
    mixed = st.lists(scraps | spaces | st.text(max_size=6), max_size=14).map("".join)
    return mixed | st.text(max_size=40)
