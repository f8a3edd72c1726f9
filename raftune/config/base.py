"""Base class of all configuration sections: frozen, no unknown keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class ConfigSection(BaseModel):
    """A section whose fields cannot be changed after it was validated, and that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _whole_numbers_can_be_counted_to(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) >= 2**63:  # what tables, files and tensors count by ends here
                raise ValueError(f"{name} must be below 2**63; got {value:.3g}. Lower it.")
        return self


def read_columns(value: Any) -> Any:
    """`prompt=question,completion=answer` as the mapping that it means; anything else as it is."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not all(sign and name.strip() and column.strip() for name, sign, column in pairs):
        raise ValueError(f"columns must be name=column pairs; got {value!r}. Write prompt=question,completion=answer.")
    return {name.strip(): column.strip() for name, _, column in pairs}


# By the name that raftune reads, the column of the data that is meant.
ColumnNames = Annotated[dict[str, str] | None, BeforeValidator(read_columns)]
COLUMNS_FIELD: Any = Field(
    None,
    exclude_if=lambda value: value is None,  # so that what was made before there was the field is still the same
    description="Columns of other names: prompt=question,completion=answer, or a mapping.",
)


def tag_of(field: str, default: str) -> Callable[[Any], str]:
    """Reads the tag of a section whose class this field chooses: its value, or `custom` for code of the user's own."""

    def tag(section: Any) -> str:
        value = str(section.get(field, default) if isinstance(section, dict) else getattr(section, field, default))
        return "custom" if ":" in value else value

    return tag
