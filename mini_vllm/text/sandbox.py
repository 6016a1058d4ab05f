"""The Jinja environment in which chat templates run: a template is data from a stranger.

Jinja's immutable sandbox refuses attribute access to Python's internals. It does not bound work, so this
environment does: every loop entry, call and filter checks a deadline, and whatever can make a value much larger
than its inputs (repetition, padding, joining, nested structures printed in full) is checked before it happens.
`limits()` opens the budget of one rendering; going over it raises `TemplateLimitError`.
"""

import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import Environment, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARS = 4_000_000
"""Characters of one string, items of one sequence, and size of the whole rendering."""
MAX_SECONDS = 10.0
_MAX_INT_BITS = 100_000

_CONTAINERS = (list, tuple, set, frozenset, Mapping, KeysView, ValuesView, ItemsView)
_PRINTING_FILTERS = frozenset(
    {"join", "string", "format", "pprint", "urlencode", "xmlattr", "e", "escape", "forceescape", "safe", "tojson"}
)
_PADDING_FILTERS = frozenset({"center", "indent", "batch", "slice", "truncate", "wordwrap"})
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\d{5,}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(?:\d{5,}|\{)")

_deadline: ContextVar[float] = ContextVar("template_deadline", default=float("inf"))


class TemplateLimitError(SecurityError):
    """A template asked for more time or memory than any honest one needs."""


@contextmanager
def limits() -> Iterator[None]:
    """The time budget of one compilation or rendering."""
    token = _deadline.set(time.monotonic() + MAX_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


def _tick() -> None:
    if time.monotonic() > _deadline.get():
        raise TemplateLimitError(f"the template runs for more than {MAX_SECONDS:g} s")


def _refuse_size(size: int) -> None:
    if size > MAX_CHARS:
        raise TemplateLimitError(f"the template makes a value of more than {MAX_CHARS} characters or items")


def _weigh(*values: Any) -> None:
    """Refuse values that would print longer than the limit, counting shared parts each time they appear."""
    total, stack = 0, list(values)
    while stack:
        value = stack.pop()
        total += len(value) + 8 if isinstance(value, str) else 8  # what a quoted, separated item prints at least
        if isinstance(value, Mapping):
            stack.extend(value.keys())
            stack.extend(value.values())
        elif isinstance(value, _CONTAINERS):
            stack.extend(value)
        _refuse_size(total + len(stack))


def _checked(value: Any) -> Any:
    if isinstance(value, (str, bytes, *_CONTAINERS)):
        _refuse_size(len(value))
    return value


def _check_replace(subject: Any, args: tuple[Any, ...]) -> None:
    if len(args) >= 2 and all(isinstance(part, str) for part in (subject, *args[:2])):
        _refuse_size(len(subject) + subject.count(args[0]) * len(args[1]))


def _check_join(separator: Any, items: Any) -> None:
    if isinstance(separator, str) and isinstance(items, (str, *_CONTAINERS)):
        _refuse_size(len(separator) * len(items))


def _check_format(template: Any) -> None:
    if isinstance(template, str) and (_WIDE_PERCENT.search(template) or _WIDE_BRACES.search(template)):
        raise TemplateLimitError("the template formats with a computed width, or one of more than 4 digits")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the deadline and the sizes checked; Jinja's pass_* markers are kept by `wraps`."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _tick()
        operands = (*args[skip:], *kwargs.values())
        if name in _PRINTING_FILTERS:
            _weigh(*operands)
        if name in _PADDING_FILTERS and any(isinstance(x, int) and abs(x) > 10_000 for x in operands):
            raise TemplateLimitError(f"the filter {name} is given a size above 10000")
        if name == "format":
            _check_format(operands[0])
        if name == "replace":
            _check_replace(operands[0], operands[1:])
        if name == "join" and len(operands) > 1:
            _check_join(operands[1], operands[0])
        return _checked(function(*args, **kwargs))

    return bounded


def _enter_loop(iterable: Any) -> Any:
    _tick()
    return iterable


def _concatenate(parts: Iterable[Any]) -> str:
    """What `~` does."""
    _tick()
    _weigh(parts)
    return "".join(map(str, parts))


def _join_output(pieces: Iterable[str]) -> str:
    """What gathers the output of templates, macros and blocks, stopped as soon as it is too long."""
    collected, total = [], 0
    for piece in pieces:
        total += len(piece)
        _refuse_size(total)
        collected.append(piece)
    _tick()
    return "".join(collected)


def _finalize(value: Any) -> Any:
    if isinstance(value, _CONTAINERS):
        _weigh(value)
    return value


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant says; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_pass_through"), [], [], body).set_lineno(line)

    def _pass_through(self, caller: Macro) -> str:
        return str(caller())


class _PlainNamespace(Namespace):
    """`namespace()` that keeps no underscore names and prints none of its contents."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805  (so that namespace(self=...) works)
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace keeps no underscore name, got {name!r}")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, bounded as this module says."""

    concat = staticmethod(_join_output)
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=_finalize,
            optimized=False,  # folding constants would do their work at compile time, outside the budget
        )
        self.globals["namespace"] = _PlainNamespace
        self.globals.pop("lipsum", None)

    def bound_filters(self) -> None:
        """Wrap every filter; call once all of them are registered."""
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters["_enter_loop"] = _enter_loop
        self.filters["_concatenate"] = _concatenate

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _instrument(super()._parse(source, name, filename), self)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _tick()
        _check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` as the sandbox has it, with its template and arguments checked first."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            _weigh(*args, *kwargs.values())
            return wrapped(*args, **kwargs)

        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _tick()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        operands = (*args, *kwargs.values())
        if isinstance(owner, (str, int, bytes)):
            _check_method(owner, name, operands)
        return _checked(super().call(__context, __obj, *args, **kwargs))


def _check_method(owner: Any, name: str, operands: tuple[Any, ...]) -> None:
    if any(isinstance(x, int) and abs(x) > 10_000 for x in operands):
        raise TemplateLimitError(f"the method {name} is given a size above 10000")
    if name == "replace":
        _check_replace(owner, operands)
    elif name == "join" and operands:
        _weigh(*operands)
        _check_join(owner, operands[0])
    elif name == "translate":
        raise TemplateLimitError("the method translate is not allowed")


def _check_binop(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_INT_BITS:
            raise TemplateLimitError(f"the template computes an integer of more than {_MAX_INT_BITS} bits")
    elif operator == "*":
        for sized, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(sized, (str, bytes, list, tuple)):
                _refuse_size(len(sized) * max(times, 0))
    elif operator == "+" and all(isinstance(x, (str, bytes, list, tuple)) for x in (left, right)):
        _refuse_size(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        _check_format(left)
        _weigh(right)


def _instrument(template: nodes.Template, environment: Environment) -> nodes.Template:
    """Route loop iterables and `~` through the checks above."""
    for loop in template.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "_enter_loop", [], [], None, None, lineno=loop.lineno)
    _replace_concats(template)
    template.set_environment(environment)
    return template


def _replace_concats(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, field, [_without_concat(item) for item in value])
        else:
            setattr(node, field, _without_concat(value))


def _without_concat(value: Any) -> Any:
    if not isinstance(value, nodes.Node):
        return value
    _replace_concats(value)
    if isinstance(value, nodes.Concat):
        parts = nodes.List(value.nodes, lineno=value.lineno)
        return nodes.Filter(parts, "_concatenate", [], [], None, None, lineno=value.lineno)
    return value
