"""What every section of a recipe is: a mapping whose keys and values are checked."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys and numbers that are not finite are mistakes, also when set later."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)
