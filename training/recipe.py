"""What all recipes have in common."""

from pydantic import BaseModel, ConfigDict


class Recipe(BaseModel):
    """Part of a recipe: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
