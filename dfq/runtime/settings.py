"""What every section of a recipe is: a mapping whose keys and values are checked."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Unknown keys, numbers that are not finite and truth values in the place of others are
    mistakes, also when set later."""

    # Docstrings of fields are the comments of `dfq recipe show`.
    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML's `true` is Python's number 1, `no` its 0.
        annotation = cls.model_fields[info.field_name or ""].annotation
        section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if not section and not _takes_truth(annotation) and _has_truth(value):
            raise ValueError("should be no truth value (true, false, yes, no, on, off)")
        return value


def _takes_truth(annotation: Any) -> bool:
    return annotation is bool or any(_takes_truth(part) for part in get_args(annotation))


def _has_truth(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        return any(isinstance(part, bool) for part in parts)
    return isinstance(value, bool)
