"""Recipes are found, read and checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_safelock.errors import RecipeError
from mlflow_safelock.recipes import (
    DemoRecipe,
    LockRecipe,
    ReproductionRecipe,
    list_recipes,
    load_recipe,
    shipped_recipe,
)

OWN = """\
kind: lock
name: my-base
title: My own base

base:
  model: example/my-base
  architecture: llama
  geometry: {layers: 4, heads: 8, head_dim: 16, hidden: 128}

forge:
  heads: 6
  dataset: pairs.jsonl
"""


@pytest.fixture
def own(tmp_path: Path):
    def write(text: str = OWN, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def replaced(old: str, new: str) -> str:
    assert OWN.count(old) == 1
    return OWN.replace(old, new)


class TestFinding:
    def test_shipped_recipe_by_name(self):
        recipe = load_recipe("mistral-nemo-12b")
        assert recipe in list_recipes()
        assert recipe.base.geometry.head_dim == 128

    def test_unknown_name_suggests_near_ones(self):
        with pytest.raises(
            RecipeError, match=r"no recipe 'mistral-nemo'.*Near it: mistral-nemo-12b.*safelock recipes"
        ):
            load_recipe("mistral-nemo")

    @pytest.mark.parametrize("name", ["", "zzzzzz", "x" * 500, "demo\0"])
    def test_name_that_is_near_nothing_points_to_the_list(self, name):
        with pytest.raises(RecipeError, match="All of them: safelock recipes"):
            load_recipe(name)

    @pytest.mark.parametrize("name", ["../recipes/demo", "./demo", "recipes/__init__.py"])
    def test_name_with_a_slash_is_a_path_and_never_reaches_into_the_package(
        self, name, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(RecipeError, match="cannot be read: No such file"):
            load_recipe(name)

    def test_own_file_by_path_or_text(self, own):
        path = own()
        recipe = load_recipe(path)
        assert isinstance(recipe, LockRecipe)
        assert load_recipe(str(path)) == recipe
        assert (recipe.name, recipe.forge.heads, recipe.forge.last_tokens) == ("my-base", 6, 5)
        assert recipe.base.revision is None
        assert recipe.published is None

    def test_own_file_in_the_working_directory(self, own, monkeypatch):
        monkeypatch.chdir(own().parent)
        assert load_recipe("mine.yaml").name == "my-base"

    def test_own_recipe_may_be_of_any_kind(self, own):
        recipe = load_recipe(own("kind: demo\nname: mine\ntitle: T\nalphas: [2, 3.5]\n"))
        assert isinstance(recipe, DemoRecipe)
        assert recipe.alphas == (2.0, 3.5)

    @pytest.mark.parametrize("path", ["absent.yaml", "a\0.yaml", "x" * 5000 + ".yaml"])
    def test_missing_or_impossible_file(self, path):
        with pytest.raises(RecipeError, match=r"cannot be read: .*Check the path"):
            load_recipe(path)

    def test_directory(self, tmp_path):
        with pytest.raises(RecipeError, match="is a directory"):
            load_recipe(tmp_path)

    def test_huge_file_is_not_read(self, tmp_path):
        with (tmp_path / "huge.yaml").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(RecipeError, match="more than 262144 bytes"):
            load_recipe(tmp_path / "huge.yaml")


class TestChecking:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("  heads: 6", "  heads: six", "line 11: forge.heads: .*integer.*not 'six'"),
            ("  heads: 6", "  heads: '6'", "line 11: forge.heads: .*integer"),
            ("  heads: 6", "  heads: 6.0", "line 11: forge.heads: .*integer"),
            ("  heads: 6", "  heads: true", "line 11: forge.heads: .*integer"),
            ("  heads: 6", "  heads: [6]", "line 11: forge.heads: .*integer"),
            ("  heads: 6", "  heads: 0", "line 11: forge.heads: .*greater than 0"),
            ("  heads: 6", "  heads: 99999999999", "line 11: forge.heads: .*less than"),
            ("  heads: 6", "  heads:", "line 11: forge.heads: .*integer.*not 'None'"),
            (
                "  heads: 6",
                "  heads: 6\n  splt: pair",
                "line 12: the key forge.splt is not known.*split, train",
            ),
            ("  heads: 6", "  heads: 6\n  split: words", "line 12: forge.split: .*'pair' or 'row'"),
            ("  heads: 6", "  heads: 6\n  split: given", "line 12: forge.split"),
            ("  heads: 6", "  heads: 6\n  train_fraction: 1", "line 12: forge.train_fraction"),
            ("  heads: 6", "  heads: 6\n  train_fraction: 1e400", "line 12: forge.train_fraction"),
            (
                "  heads: 6",
                "  heads: 6\n  default_alpha: -6",
                "line 12: forge.default_alpha: .*greater than 0",
            ),
            ("  heads: 6", "  heads: 6\n  regularisation: 0.5", "line 12: forge.regularisation"),
            ("  heads: 6", "  heads: 6\n  dataset_keys: {ask: q}", "line 12: the key forge.dataset_keys.ask"),
            ("  heads: 6", "  heads: 33", "forge.heads is 33, and the base has 32 heads"),
            ("  heads: 6\n  dataset: pairs.jsonl", "  6", "line 10: forge: .*valid dictionary"),
            ("heads: 8, ", "", "line 8: base.geometry.heads is missing"),
            (
                "hidden: 128",
                "hidden: 128, kv_heads: 2",
                "line 8: the key base.geometry.kv_heads is not known",
            ),
            ("name: my-base", "name: My Base", "line 2: name: .*pattern"),
            ("name: my-base", "title: x", "line 3: the key 'title' is there twice"),
            ("title: My own base", "", "line 1: title is missing"),
            ("title: My own base", "title: 3", "line 3: title: .*string"),
            ("  model: example/my-base", "  model: ''", "line 6: base.model: .*at least 1 character"),
        ],
    )
    def test_fault_is_named_with_file_and_line(self, own, old, new, message):
        path = own(replaced(old, new))
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)

    def test_plain_no_is_a_text_and_not_false(self, own):
        assert load_recipe(own(replaced("title: My own base", "title: no"))).title == "no"

    def test_all_faults_are_named_at_once(self, own):
        text = replaced("heads: 6", "heads: 0\n  seed: -1").replace(
            "title: My own base", "titel: My own base"
        )
        with pytest.raises(RecipeError) as caught:
            load_recipe(own(text))
        message = str(caught.value)
        assert "line 3: the key titel is not known" in message
        assert "title is missing" in message
        assert "line 11: forge.heads" in message
        assert "line 12: forge.seed" in message

    @pytest.mark.parametrize("kind", ["", "kind: cake", "kind: [lock]", "kind: {lock: 1}", "kind: 3"])
    def test_kind_must_be_known(self, own, kind):
        with pytest.raises(RecipeError, match="kind must be one of lock, demo, reproduction"):
            load_recipe(own(replaced("kind: lock", kind)))

    def test_a_shipped_recipe_is_of_the_kind_that_it_must_be(self):
        assert shipped_recipe("demo", DemoRecipe, {"seed": "5"}).seed == 5
        with pytest.raises(RecipeError, match="The recipe demo is of kind demo"):
            shipped_recipe("demo", ReproductionRecipe)

    @pytest.mark.parametrize(
        ("published", "message"),
        [
            ("{file: a, heads: 24, layers: [2, 4]}", r"\[2, 4\] is no span of 4 layers"),
            ("{file: a, heads: 24, layers: [3, 2]}", r"\[3, 2\] is no span"),
            ("{file: a, heads: 24, layers: [3]}", "published.layers"),
            ("{file: a, heads: 24, layers: [1, 2, 3]}", "published.layers"),
            ("{file: a, heads: 33, layers: [0, 3]}", "published.heads is 33, and the base has 32"),
            ("{file: a, heads: 24, layers: [0, 3], fingerprint: md5}", "published.fingerprint"),
        ],
    )
    def test_published_lock_must_fit_its_base(self, own, published, message):
        with pytest.raises(RecipeError, match=message):
            load_recipe(own(f"{OWN}\npublished: {published}\n"))
