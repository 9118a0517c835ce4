"""The installed packages: whether each is in the range that this one was made for."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from mlflow_safelock.operations.findings import Finding

PACKAGE = "mlflow-safelock"

SHOWN = ("mlflow", "torch", "transformers", "safetensors", "pydantic")
"""The packages whose versions are told where all is well; JSON has all of them."""


def ask_versions() -> Finding:
    """Whether every package that this one requires is installed, in a version that it was made for."""
    try:
        required = [Requirement(line) for line in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        return Finding(
            "versions",
            "fault",
            f"{PACKAGE} is not installed in this environment, so MLflow does not find its store.",
            "Install it: pip install . in a checkout, or its wheel.",
        )
    wanted = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    installed = {one.name: _installed(one.name) for one in wanted}
    facts = {PACKAGE: version(PACKAGE), **installed}
    faults = tuple(_faults(wanted, installed))
    if faults:
        unmet = " ".join(f"'{one}'" for one, _ in faults)
        return Finding(
            "versions",
            "fault",
            f"{'; '.join(what for _, what in faults)}.",
            f"Install what it was made for: pip install {unmet}",
            facts,
        )
    shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN)
    return Finding("versions", "ok", f"{PACKAGE} {facts[PACKAGE]} has what it needs: {shown}.", "", facts)


def _faults(wanted: list[Requirement], installed: dict[str, str | None]) -> Iterator[tuple[Requirement, str]]:
    for one in wanted:
        found = installed[one.name]
        if found is None:
            yield one, f"{one.name} is not installed"
        elif not one.specifier.contains(found, prereleases=True):
            yield one, f"{one.name} is {found}, and must be {one.specifier}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
