"""The recipes that come with the package."""

from __future__ import annotations

from importlib import resources

import pytest

from mlflow_safelock.recipes import (
    DemoRecipe,
    LockRecipe,
    ReproductionRecipe,
    list_recipes,
    published_recipes,
    recipes_of_base,
)

# Layers, query heads, head_dim and hidden of each base, from their public configurations.
BASES = {
    "meta-llama/Meta-Llama-3-8B-Instruct": ("llama", 32, 32, 128, 4096),
    "meta-llama/Meta-Llama-3.1-8B-Instruct": ("llama", 32, 32, 128, 4096),
    "meta-llama/Meta-Llama-3-70B-Instruct": ("llama", 80, 64, 128, 8192),
    "meta-llama/Meta-Llama-3.1-70B-Instruct": ("llama", 80, 64, 128, 8192),
    "mistralai/Mistral-Nemo-Instruct-2407": ("mistral", 40, 32, 128, 5120),
    "mistralai/Mistral-Large-Instruct-2407": ("mistral", 88, 96, 128, 12288),
}
NAMES = [
    "demo",
    "llama-3-70b-instruct",
    "llama-3-70b-instruct-48",
    "llama-3-8b-instruct",
    "llama-3.1-70b-instruct",
    "llama-3.1-70b-instruct-48",
    "llama-3.1-8b-instruct",
    "mistral-large-123b",
    "mistral-large-123b-48",
    "mistral-nemo-12b",
    "reproduction",
]


def test_nine_published_locks_the_demo_and_the_reproduction_are_there():
    assert [recipe.name for recipe in list_recipes()] == NAMES
    assert len(published_recipes()) == 9
    assert isinstance(list_recipes()[0], DemoRecipe)
    assert isinstance(list_recipes()[-1], ReproductionRecipe)


def test_every_recipe_file_is_listed_under_its_own_name():
    files = resources.files("mlflow_safelock.recipes").iterdir()
    assert sorted(file.name for file in files if file.name.endswith((".yaml", ".yml"))) == sorted(
        f"{recipe.name}.yaml" for recipe in list_recipes()
    )


@pytest.mark.parametrize("recipe", published_recipes(), ids=lambda recipe: recipe.name)
class TestPublished:
    def test_base_has_its_geometry(self, recipe: LockRecipe):
        geometry = recipe.base.geometry
        assert BASES[recipe.base.model] == (
            recipe.base.architecture,
            geometry.layers,
            geometry.heads,
            geometry.head_dim,
            geometry.hidden,
        )

    def test_forge_settings_are_the_papers(self, recipe: LockRecipe):
        assert recipe.forge.model_dump() == {
            "heads": recipe.published.heads,
            "last_tokens": 5,
            "pairs": 100,
            "dataset": None,
            "dataset_keys": {"question": "question", "safe": "safe", "unsafe": "unsafe"},
            "system_prompt": None,
            "split": "row",
            "train_fraction": 0.6,
            "seed": 0,
            "regularisation": 1.0,
            "batch_size": 8,
            "default_alpha": 6.0,
        }

    def test_name_and_title_say_how_many_heads(self, recipe: LockRecipe):
        assert recipe.published.heads in (24, 48)
        assert recipe.name.endswith("-48") == (recipe.published.heads == 48)
        assert recipe.title.endswith(f"{recipe.published.heads} heads")


def test_recipes_of_a_base_are_found_by_its_exact_name():
    found = recipes_of_base("mistralai/Mistral-Large-Instruct-2407")
    assert [recipe.name for recipe in found] == ["mistral-large-123b", "mistral-large-123b-48"]
    assert recipes_of_base("mistralai/mistral-large-instruct-2407") == ()
    assert recipes_of_base("example/unheard-of") == ()


def test_all_recipes_are_frozen():
    for recipe in list_recipes():
        with pytest.raises(ValueError, match="frozen"):
            recipe.title = "another"
