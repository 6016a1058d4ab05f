"""The page of a report: plain HTML with its style inside, pictures beside it, nothing from anywhere else.

It reads on a phone (tables scroll by themselves, pictures shrink), in the dark, and on paper. Whatever comes from
outside is escaped.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """head: of the columns; empty for a table of names and values. marked: numbers of rows that stand out."""

    rows: Rows
    head: Sequence[str] = ()
    caption: str = ""
    note: str = ""
    marked: Collection[int] = ()


@dataclass(frozen=True)
class Image:
    """Files are named relative to the page."""

    svg: str
    png: str
    title: str
    reading: str


@dataclass(frozen=True)
class Page:
    """answer: one sentence, first. settings: names and values, last. files: name and what it holds."""

    title: str
    answer: str
    command: str = ""
    tables: Sequence[Table] = ()
    images: Sequence[Image] = ()
    settings: Rows = ()
    files: Mapping[str, str] = field(default_factory=dict)


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #59636e; --line: #d8dee4; --back: #fff; --tint: #f3f6f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a3adb8; --line: #3a424b; --back: #14181c; --tint: #1e242a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .2rem 0 .6rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.answer { font-size: 1.1rem; margin: 0 0 1rem; }
pre { background: var(--tint); padding: .7rem .9rem; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .28rem .9rem .28rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th, tbody th { font-weight: 600; color: var(--soft); }
tr.marked th, tr.marked td { background: var(--tint); font-weight: 700; color: var(--ink); }
table.settings th, table.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere;
  vertical-align: top; font-size: .85rem; }
td.error { text-align: left; white-space: normal; min-width: 16rem; }
.note { color: var(--soft); font-size: .9rem; margin: .4rem 0 0; }
figure { margin: 0 0 1.8rem; }
figure img { display: block; width: 100%; max-width: 56rem; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); padding: .5rem; }
figcaption { margin-top: .5rem; color: var(--soft); max-width: 56rem; }
figcaption strong { color: var(--ink); }
ul.files { padding-left: 1.1rem; }
a { color: inherit; }
@media (max-width: 40rem) {
  tbody th { white-space: normal; }
  th, td { padding-right: .7rem; }
}
@media print { figure { break-inside: avoid; } }
"""


def render_page(page: Page) -> str:
    """The whole document."""
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(page.title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        "<main>",
        f"<h1>{escape(page.title)}</h1>",
        f'<p class="answer">{escape(page.answer)}</p>',
        *_command(page.command),
        *(line for table in page.tables for line in _table(table)),
        *_images(page.images),
        *_settings(page.settings),
        *_files(page.files),
        "</main>",
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _command(command: str) -> list[str]:
    return [f"<pre>{escape(command)}</pre>"] if command else []


def _table(table: Table) -> Iterable[str]:
    if table.caption:
        yield f"<h2>{escape(table.caption)}</h2>"
    yield '<div class="scroll"><table>'
    if table.head:
        yield "<thead><tr>" + "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head) + "</tr></thead>"
    yield "<tbody>"
    for number, (first, *rest) in enumerate(table.rows):
        cells = "".join(_cell(cell) for cell in rest)
        kind = ' class="marked"' if number in table.marked else ""
        yield f'<tr{kind}><th scope="row">{escape(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{escape(table.note)}</p>'


def _cell(text: str) -> str:
    """Sentences may be broken into lines, numbers may not."""
    kind = ' class="error"' if len(text) > 40 else ""
    return f"<td{kind}>{escape(text)}</td>"


def _images(images: Sequence[Image]) -> Iterable[str]:
    if images:
        yield "<h2>Pictures</h2>"
    for image in images:
        title, reading = escape(image.title), escape(image.reading)
        yield f'<figure><a href="{escape(image.svg)}"><img src="{escape(image.svg)}" alt="{title}"></a>'
        png = f'<a href="{escape(image.png)}">PNG</a>'
        yield f"<figcaption><strong>{title}.</strong> {reading} ({png})</figcaption></figure>"


def _settings(settings: Rows) -> Iterable[str]:
    if settings:
        yield '<h2>What was asked</h2>\n<table class="settings"><tbody>'
        for name, value in settings:
            yield f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        yield "</tbody></table>"


def _files(files: Mapping[str, str]) -> Iterable[str]:
    if not files:
        return
    yield "<h2>Files</h2>"
    yield '<ul class="files">'
    for name, what in files.items():
        yield f'<li><a href="{escape(name)}">{escape(name)}</a>: {escape(what)}</li>'
    yield "</ul>"
