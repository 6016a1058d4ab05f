"""Whether a chat template wants a message's content as one string or as a list of parts, read off the template.

A template that loops over `message.content` was written for parts (`{"type": "text", "text": ...}`); any other would
print such a list as Python. What counts is in the syntax tree: a `for` whose iterable is a message's content, be it
directly, through filters, under another name (`set`), or as the argument of a macro.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from jinja2 import nodes

from mini_vllm.text.chat_template import parse_template

ContentFormat = Literal["string", "openai"]
_MAX_ALIASES = 16


@lru_cache(maxsize=64)
def content_format_of(template: str) -> ContentFormat:
    """'openai' for a template that loops over the parts of a content. Raises as `compile_template` does."""
    tree = parse_template(template)
    names = _content_names(tree)
    loops = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    return "openai" if loops else "string"


def _content_names(tree: nodes.Template) -> set[str]:
    """Variables that hold a message's content somewhere in the template."""
    bindings = list(_bindings(tree))
    names: set[str] = set()
    for _ in range(_MAX_ALIASES):  # an alias of an alias
        found = {name for name, value in bindings if _is_content(value, names)}
        if found <= names:
            break
        names |= found
    return names


def _bindings(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name):
            yield assignment.target.name, assignment.node
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name in macros:
            parameters = macros[call.node.name].args
            yield from ((p.name, value) for p, value in zip(parameters, call.args, strict=False))
            yield from ((pair.key, pair.value) for pair in call.kwargs)


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Whether this expression is a content, or what filters, tests and slices make of one."""
    while isinstance(node, nodes.Filter | nodes.Test):
        node = node.node
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Const):
            return bool(node.arg.value == "content")
        return isinstance(node.arg, nodes.Slice) and _is_content(node.node, names)
    return False
