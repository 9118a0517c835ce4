from __future__ import annotations

from pathlib import Path

from tests.apply.support_table import support_table

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "applying.md"


def test_the_documented_architectures_are_those_of_the_table():
    assert f"\n{support_table()}\n" in DOCUMENTATION.read_text(encoding="utf-8")
