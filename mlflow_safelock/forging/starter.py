"""The preference pairs that come with this package."""

from __future__ import annotations

from importlib.resources import as_file, files

from mlflow_safelock.forging.preferences import PreferencePair, load_pairs


def starter_preference_pairs() -> tuple[PreferencePair, ...]:
    """The package's own preference pairs, to forge a first lock from (docs/forging.md says what is in them).

    Example:
        >>> len(starter_preference_pairs()) >= 200
        True
    """
    with as_file(files("mlflow_safelock.forging") / "data" / "starter_preference.jsonl") as path:
        return load_pairs(path)
