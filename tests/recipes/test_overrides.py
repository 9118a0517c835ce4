"""Single settings of a recipe can be changed, and only settings that there are."""

from __future__ import annotations

import pytest

from mlflow_safelock.errors import RecipeError
from mlflow_safelock.recipes import LockRecipe, list_recipes, load_recipe
from mlflow_safelock.recipes.overrides import setting_keys

NAME = "llama-3-8b-instruct"


def test_values_are_read_as_yaml():
    recipe = load_recipe(
        NAME,
        {
            "forge.heads": "48",
            "forge.split": "pair",
            "forge.train_fraction": "7e-1",
            "forge.default_alpha": "4",
            "forge.dataset": "pairs.jsonl",
            "forge.dataset_keys.safe": "answer_matching_behavior",
            "forge.system_prompt": "'Be kind: always.'",
            "base.revision": "'0123'",
            "base.geometry.layers": "33",
            "published.layers": "[6, 31]",
        },
    )
    assert (recipe.forge.heads, recipe.forge.split, recipe.forge.train_fraction) == (48, "pair", 0.7)
    assert (recipe.forge.default_alpha, recipe.forge.dataset) == (4.0, "pairs.jsonl")
    assert recipe.forge.dataset_keys.safe == "answer_matching_behavior"
    assert recipe.forge.dataset_keys.unsafe == "unsafe"
    assert recipe.forge.system_prompt == "Be kind: always."
    assert recipe.base.revision == "0123"
    assert recipe.base.geometry.layers == 33
    assert recipe.published.layers == (6, 31)


def test_recipe_itself_stays_as_it_is():
    before = load_recipe(NAME)
    load_recipe(NAME, {"forge.heads": "48"})
    assert load_recipe(NAME) == before
    assert load_recipe(NAME).forge.heads == 24


def test_lists_of_the_demo_can_be_set():
    recipe = load_recipe("demo", {"alphas": "[1, 2.5]", "head_counts": "[4]"})
    assert (recipe.alphas, recipe.head_counts) == ((1.0, 2.5), (4,))


@pytest.mark.parametrize(
    ("key", "near"),
    [("forge.head", "forge.heads"), ("heads", "forge.heads"), ("forge.Split", "forge.split"), ("foo", None)],
)
def test_unknown_setting_is_refused_with_the_known_ones(key, near):
    with pytest.raises(RecipeError) as caught:
        load_recipe(NAME, {key: "1"})
    message = str(caught.value)
    assert f"recipe {NAME} has no setting {key!r}" in message
    assert near is None or f"Is it {near!r}?" in message
    assert "forge.heads, forge.last_tokens" in message


@pytest.mark.parametrize(
    "key", ["", ".", "forge", "forge.", "forge.heads.x", "base.geometry", "kind", "name"]
)
def test_groups_and_the_recipes_identity_cannot_be_set(key):
    with pytest.raises(RecipeError, match="no setting"):
        load_recipe(NAME, {key: "1"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("forge.heads", "many", "forge.heads: .*integer, .*not 'many'"),
        ("forge.heads", "'48'", "forge.heads: .*integer"),
        ("forge.heads", "2000", "forge.heads is 2000, and the base has 1024"),
        ("forge.heads", "", "forge.heads: .*integer"),
        ("forge.train_fraction", "1.5", "less than 1"),
        ("forge.seed", "{a: 1}", "forge.seed"),
        ("forge.split", "[", "value of forge.split.*not YAML"),
        ("forge.split", "*a", "aliases"),
        ("forge.split", "!!python/name:os.system x", "tag"),
    ],
)
def test_values_are_checked_like_the_files_own(key, value, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(NAME, {key: value})


def test_fault_in_an_override_points_to_it_and_not_to_a_line():
    with pytest.raises(RecipeError, match=f"^recipe {NAME}, --set forge.heads=many: forge.heads"):
        load_recipe(NAME, {"forge.heads": "many"})


def test_group_that_the_recipe_leaves_out_can_be_set_and_one_it_denies_cannot(tmp_path):
    text = "kind: lock\nname: a\ntitle: a\nbase: {model: a, architecture: llama, geometry: "
    text += "{layers: 4, heads: 8, head_dim: 16, hidden: 128}}\npublished: null\n"
    (tmp_path / "a.yaml").write_text(text)
    assert load_recipe(tmp_path / "a.yaml", {"forge.heads": "3"}).forge.heads == 3
    with pytest.raises(RecipeError, match="has no published, so nothing in it can be set"):
        load_recipe(tmp_path / "a.yaml", {"published.heads": "3"})


def test_every_setting_of_every_recipe_can_be_named():
    for recipe in list_recipes():
        keys = set(setting_keys(type(recipe)))
        assert {key.split(".")[0] for key in keys} == set(type(recipe).model_fields)
    assert "base.geometry.head_dim" in set(setting_keys(LockRecipe))
