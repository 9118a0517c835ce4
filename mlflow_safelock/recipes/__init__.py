"""Recipes: what to run, as checked data.

A recipe is a YAML file. The ones in this folder say, for each published lock, which base model it belongs to
and how the paper forged it, and hold the settings of the demo and of the
reproduction; a user's own file is read in the same way.
"""

from __future__ import annotations

from mlflow_safelock.recipes.catalogue import (
    Recipe,
    list_recipes,
    load_recipe,
    published_recipes,
    recipes_of_base,
    shipped_recipe,
)
from mlflow_safelock.recipes.demo_recipe import DemoRecipe
from mlflow_safelock.recipes.lock_recipe import (
    DatasetKeys,
    ForgeSettings,
    LockRecipe,
    PublishedLock,
    RecipeBase,
)
from mlflow_safelock.recipes.reproduction_recipe import ReproductionRecipe

__all__ = [
    "DatasetKeys",
    "DemoRecipe",
    "ForgeSettings",
    "LockRecipe",
    "PublishedLock",
    "Recipe",
    "RecipeBase",
    "ReproductionRecipe",
    "list_recipes",
    "load_recipe",
    "published_recipes",
    "recipes_of_base",
    "shipped_recipe",
]
