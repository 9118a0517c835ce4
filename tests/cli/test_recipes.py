"""``safelock recipes`` lists what can be run."""

from __future__ import annotations

from mlflow_safelock.recipes import list_recipes
from tests.cli.conftest import Run


def test_the_table_names_every_recipe_and_its_base(run: Run) -> None:
    lines = run("recipes").stdout.splitlines()
    for recipe in list_recipes():
        (line,) = (line for line in lines if line.split(" ")[0] == recipe.name)
        assert recipe.title in line
        assert recipe.kind != "lock" or recipe.base.model in line


def test_json_holds_the_recipes_as_they_are(run: Run) -> None:
    found = run("recipes", "--format", "json").json
    assert found == [recipe.model_dump(mode="json") for recipe in list_recipes()]
