"""Base class of all configuration sections: frozen, no unknown keys."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core.core_schema import CoreSchema, no_info_before_validator_function


def _describe_input(schema: dict[str, Any], section: type[Any]) -> None:
    """Completes the JSON schema of a section by what it reads besides the section itself."""
    fields = schema.get("properties", {})
    for field in fields.values():
        if "description" in field:
            field["description"] = " ".join(field["description"].split())
        if "oneOf" in field:  # without the discriminator several classes of a section may match
            field["anyOf"] = field.pop("oneOf")
    if section.shorthand:
        text = {rule: value for rule, value in fields[section.shorthand].items() if rule in ("pattern", "minLength")}
        schema |= {"type": ["object", "string"], **text}


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation allows, without those of the items of a list."""
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*(_kinds(argument) for argument in get_args(annotation)))
    return _kinds(get_args(annotation)[0]) if get_origin(annotation) is Annotated else {annotation}


class ConfigSection(BaseModel):
    """A section whose fields cannot be changed after it was validated, and that refuses unknown keys.

    `shorthand` names the field that a plain text stands for.
    """

    shorthand: ClassVar[str] = ""
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_describe_input,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for field in cls.model_fields.values():
            field.description = field.description and " ".join(field.description.split())

    @model_validator(mode="before")
    @classmethod
    def _text_is_one_field(cls, value: Any) -> Any:
        return {cls.shorthand: value} if cls.shorthand and isinstance(value, str) else value

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1 where a number is due."""
        if isinstance(value, bool) and cls._takes_numbers_alone(str(info.field_name)):
            word = str(value).lower()
            raise ValueError(f"{info.field_name} must be a number; got {word}, which is not one. Write a number.")
        return value

    @classmethod
    @cache
    def _takes_numbers_alone(cls, field: str) -> bool:
        kinds = _kinds(cls.model_fields[field].annotation)
        return bool(kinds & {int, float}) and bool not in kinds

    @model_validator(mode="after")
    def _integers_have_64_bits(self) -> Self:
        for name, value in self:
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"{name} must be below 2**63; got {value:.3g}. Lower it.")
        return self


def read_columns(value: Any) -> Any:
    """Parses `prompt=question,completion=answer`; anything else is returned as it is."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not all(sign and name.strip() and column.strip() for name, sign, column in pairs):
        raise ValueError(f"columns must be name=column pairs; got {value!r}. Write prompt=question,completion=answer.")
    return {name.strip(): column.strip() for name, _, column in pairs}


# The data's column for each name that raftune reads.
ColumnNames = Annotated[
    dict[str, str] | None, BeforeValidator(read_columns, json_schema_input_type=dict[str, str] | str | None)
]


class OneOrMore:
    """Annotates a list that may be given as its only item, a text or a mapping."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def listed(value: Any) -> Any:
            return (value,) if isinstance(value, str | dict | BaseModel) else value

        return no_info_before_validator_function(listed, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        many = handler(schema)
        return {"anyOf": [many["items"], many]}


THREADS_FIELD: Any = Field(
    default_factory=lambda: os.cpu_count() or 1, ge=1, description="Threads for tensor arithmetic on the CPU."
)
COLUMNS_FIELD: Any = Field(
    None,
    exclude_if=lambda value: value is None,  # so that fingerprints from before this field stay valid
    description="Columns of other names: prompt=question,completion=answer, or a mapping.",
)


def tag_of(field: str, default: str) -> Callable[[Any], str]:
    """Returns a discriminator by this field: its value, or `custom` for a user's own code."""

    def tag(section: Any) -> str:
        value = str(section.get(field, default) if isinstance(section, dict) else getattr(section, field, default))
        return "custom" if ":" in value else value

    return tag
