"""What becomes of each field of a request body: it acts, or is harmless and accepted, or is refused. None is ignored.

A body is an `ApiModel`: its declared fields act. `ACCEPTED` names those that change nothing here and say why; `REFUSED`
those that would change something we cannot do, with the values that ask for nothing and so may stand. Whatever is in
none of the three is refused by name. `docs/api-fields.md` is made from these tables.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema

from mini_vllm.exceptions import InvalidParameterError


@dataclass(frozen=True)
class Refused:
    """why: for the client. neutral: whether a value asks for nothing; None always does."""

    why: str
    neutral: Callable[[Any], bool] = lambda value: value in (False, "", [], {})


MAX_ENTRIES = 10_000
"""Of an object that is the value of a field, such as logit_bias."""


def _fail_fast(schema: Any) -> None:
    """Let every list of a schema end at its first wrong item: a body of a megabyte can have a million of them, and
    telling each takes the event loop longer than anything else that a client can ask for."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "set", "tuple"):
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            _fail_fast(part)


class ApiModel(BaseModel):
    """A request body, or an object inside one."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    ACCEPTED: ClassVar[Mapping[str, str]] = {}
    REFUSED: ClassVar[Mapping[str, Refused]] = {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _sort_fields(cls, data: Any) -> Any:
        """Leave only declared fields. Raises `InvalidParameterError`, which pydantic wraps in its own error's `ctx`."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                if isinstance(value, dict) and len(value) > MAX_ENTRIES:
                    raise InvalidParameterError(name, f"has {len(value)} entries, more than {MAX_ENTRIES}")
                kept[name] = value
            elif name in cls.REFUSED:
                refused = cls.REFUSED[name]
                if value is not None and not refused.neutral(value):
                    raise InvalidParameterError(name, refused.why)
            elif name not in cls.ACCEPTED:
                raise InvalidParameterError(name[:64], cls._unknown(name[:64]))
        return kept

    @classmethod
    def _unknown(cls, name: str) -> str:
        known = [*cls.model_fields, *cls.ACCEPTED]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return f"Unrecognized request argument supplied: {name}{hint}"


M = TypeVar("M", bound=ApiModel)


def translated(model: type[M], fields: Mapping[str, Any]) -> M:
    """The body that another one stands for. What does not fit it is wrong with the request, not with the server."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        wrong = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        raise RequestValidationError(wrong, body=fields) from None


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about these fields come out under the names that they have in another body."""
    try:
        yield
    except InvalidParameterError as error:
        if error.field not in names:
            raise
        raise type(error)(names[error.field], str(error).removeprefix(f"{error.field}: ")) from None
