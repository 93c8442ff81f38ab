"""The base class of the typed sections and the one-line error that replaces pydantic's report."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

_RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than_equal")


class ConfigError(ValueError):
    """A configuration that cannot be used. Its text is one line; several problems are joined with "; "."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Section(BaseModel):
    """One section of a configuration file: immutable, no unknown keys, no silent conversion ("32" is not 32).

    Raises:
        ConfigError: on construction, naming for each problem the key, the value given and what is allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(*_problems(type(self), error)) from None


def allowed_values(field: FieldInfo) -> str:
    """What a field accepts, as a message or a help text says it: ">= 2", "above 0, up to 1", "'auto', 'faiss'"."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(repr(value) for value in get_args(field.annotation))
    if field.annotation is bool:
        return "true or false"
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
        return f"a section with the keys {', '.join(field.annotation.model_fields)}"
    names = ("gt", "ge", "le")
    bounds = {name: getattr(entry, name) for entry in field.metadata for name in names if hasattr(entry, name)}
    if "gt" in bounds:
        return f"above {bounds['gt']}" + (f", up to {bounds['le']}" if "le" in bounds else "")
    return f"{bounds['ge']} to {bounds['le']}" if "le" in bounds else f">= {bounds['ge']}"


def _problems(model: type[Section], error: ValidationError) -> list[str]:
    problems = []
    for item in error.errors():
        key, kind, context = str(item["loc"][0]), item["type"], item.get("ctx", {})
        nested = context.get("error")
        if isinstance(nested, ConfigError):
            problems += [f"{key}.{problem}" for problem in nested.problems]
        elif kind == "extra_forbidden":
            problems.append(_unknown_key(model, key, item["input"]))
        elif kind == "missing":
            field = model.model_fields[key]
            problems.append(f"{key}: missing, allowed: {allowed_values(field)} ({field.description})")
        else:
            problems.append(
                f"{key}: got {item['input']!r}, allowed: {_allowed(model.model_fields[key], kind, context)}"
            )
    return problems


def _allowed(field: FieldInfo, kind: str, context: dict[str, Any]) -> str:
    if "allowed" in context:
        return str(context["allowed"])
    nouns: dict[Any, str] = {int: "an integer ", float: "a number "}
    return ("" if kind in _RANGE_ERRORS else nouns.get(field.annotation, "")) + allowed_values(field)


def _unknown_key(model: type[Section], key: str, value: Any) -> str:
    known = list(model.model_fields)
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            known += [f"{name}.{inner}" for inner in field.annotation.model_fields]
    last_names = [name.rpartition(".")[2] for name in known]
    close = difflib.get_close_matches(key, last_names, n=1)
    meant = [name for name, last in zip(known, last_names, strict=True) if close and last == close[0]]
    hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
    return f"{key}: unknown key, got {value!r}{hint}, known keys: {', '.join(model.model_fields)}"
