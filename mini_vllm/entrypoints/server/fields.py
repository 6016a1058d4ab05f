"""What becomes of each field of a request body: it acts, it is harmless and accepted, or it is refused. None is ignored.

A body is an `ApiModel`: its declared fields act. `ACCEPTED` names those that change nothing here and say why; `REFUSED`
those that would change something we cannot do, with the values that ask for nothing and so may stand. Whatever is in
none of the three is refused by name. `docs/api-fields.md` is made from these tables.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from mini_vllm.exceptions import InvalidParameterError


@dataclass(frozen=True)
class Refused:
    """why: for the client. neutral: whether a value asks for nothing; None always does."""

    why: str
    neutral: Callable[[Any], bool] = lambda value: value in (False, "", [], {})


class ApiModel(BaseModel):
    """A request body, or an object inside one."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    ACCEPTED: ClassVar[Mapping[str, str]] = {}
    REFUSED: ClassVar[Mapping[str, Refused]] = {}

    @model_validator(mode="before")
    @classmethod
    def _sort_fields(cls, data: Any) -> Any:
        """Leave only declared fields. Raises `InvalidParameterError`, which pydantic wraps in its own error's `ctx`."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
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
