"""Write docs/api-fields.md: what becomes of every field of every request body, read off the models of the server.

    python scripts/api_fields.py            prints it
    python scripts/api_fields.py --write    writes the file

The models are those of the routes, so that no endpoint can be forgotten; a test checks that the file is up to date.
"""

import argparse
import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mini_vllm.entrypoints.anthropic.api import router as anthropic_router  # noqa: E402
from mini_vllm.entrypoints.openai.api import router as openai_router  # noqa: E402
from mini_vllm.entrypoints.server.fields import ApiModel  # noqa: E402

TARGET = ROOT / "docs" / "api-fields.md"
_INTRODUCTION = """# Fields of the API

<!-- Made by scripts/api_fields.py --write from the models of the server; do not edit. -->

Every field of a request body is in one of three tables: it **acts**, it is **accepted** because leaving it without
effect harms nobody, or it is **refused** with a 400 that says why. A name in none of them is a 400 as well, with the
nearest name that is known. `null` is the same as leaving a field out. Refused fields may be sent with a value that asks
for nothing, such as `null` or an empty list.
"""


def bodies() -> dict[type[ApiModel], list[str]]:
    """The request models, with the routes that take them, in the order of the routes."""
    found: dict[type[ApiModel], list[str]] = {}
    for route in [*openai_router.routes, *anthropic_router.routes]:
        for hint in typing.get_type_hints(route.endpoint).values():  # type: ignore[attr-defined]
            if inspect.isclass(hint) and issubclass(hint, ApiModel):
                found.setdefault(hint, []).append(_name(route))
    return found


def _name(route: Any) -> str:
    (method,) = route.methods
    return f"{method} {route.path}"


def parts_of(model: type[ApiModel]) -> Iterator[type[ApiModel]]:
    """The models of objects inside this one, at any depth."""
    for field in model.model_fields.values():
        for part in _models_in(field.annotation):
            yield part
            yield from parts_of(part)


def _models_in(annotation: Any) -> Iterator[type[ApiModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, ApiModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def document() -> str:
    """The whole page."""
    found = bodies()
    parts = dict.fromkeys(part for model in found for part in parts_of(model) if part not in found)
    sections = [_section(f"`{'`, `'.join(names)}`", model) for model, names in found.items()]
    return "\n".join(
        [_INTRODUCTION, *sections, "# Objects inside them\n", *(_section(_title(part), part) for part in parts)]
    )


def _title(part: type[ApiModel]) -> str:
    """Two APIs may have an object of the same name."""
    api = "Anthropic" if ".anthropic." in part.__module__ else "OpenAI"
    return f"{part.__name__} ({api})"


def _section(title: str, model: type[ApiModel]) -> str:
    lines = [f"## {title}\n", _first_paragraph(model), "\n| acts | |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(field.description)} |" for name, field in model.model_fields.items()]
    if model.ACCEPTED:
        lines += ["\n| accepted | because |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(why)} |" for name, why in model.ACCEPTED.items()]
    if model.REFUSED:
        lines += ["\n| refused | because |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(refused.why)} |" for name, refused in model.REFUSED.items()]
    return "\n".join(lines) + "\n"


def _first_paragraph(model: type[ApiModel]) -> str:
    return inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.name} instead of printing it")
    if parser.parse_args().write:
        TARGET.write_text(document(), encoding="utf-8")
    else:
        print(document())


if __name__ == "__main__":
    main()
