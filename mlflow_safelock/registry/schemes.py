"""Which installed package MLflow asks for the store of a registry URI."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.metadata import entry_points

import sqlalchemy as sa

_logger = logging.getLogger(__name__)

GROUP = "mlflow.model_registry_store"
"""Entry point group of the stores."""

PACKAGE = "mlflow_safelock"

MARK = "safelock"


@dataclass(frozen=True)
class Claim:
    """A package's entry point for a scheme.

    Attributes:
        scheme: The whole scheme, such as ``safelock+sqlite``.
        package: The installed distribution.
        target: What it names, as ``module:function``.
    """

    scheme: str
    package: str
    target: str

    @property
    def is_ours(self) -> bool:
        """Whether it leads into this package."""
        return self.target.partition(":")[0].partition(".")[0] == PACKAGE


def claims_of(scheme: str) -> tuple[Claim, ...]:
    """The entry points for a scheme, in MLflow's order; it takes the last."""
    return tuple(
        Claim(scheme, point.dist.name if point.dist is not None else "unknown", point.value)
        for point in entry_points(group=GROUP, name=scheme)
    )


def scheme_of(uri: str) -> str:
    """The whole scheme of a URI, as MLflow matches it; empty where there is none."""
    scheme, colon, _ = uri.partition(":")
    return scheme if colon else ""


def scheme_fault(uri: str) -> tuple[str, str] | None:
    """Why MLflow does not put the gate in front of the registry at ``uri``: the cause and the next step.

    Returns:
        ``None`` where MLflow asks this package for the store, and no other package claims the scheme.
    """
    scheme = scheme_of(uri)
    parts = scheme.split("+")
    if MARK not in parts:
        return (
            f"The registry {shown_uri(uri)} has no gate in front: its scheme is {scheme or 'a path'!r}.",
            f"Write {MARK}+ before the registry's URI, such as {MARK}+{scheme or 'sqlite'}:…",
        )
    if parts[0] != MARK:
        right = "+".join([MARK, *(part for part in parts if part != MARK)])
        return (
            f"The scheme {scheme!r} is in the wrong order: to MLflow it is plain {parts[0]}, with no gate.",
            f"Write {right}:…",
        )
    claims = claims_of(scheme)
    others = sorted({claim.package for claim in claims if not claim.is_ours})
    if others:
        winner = "this package" if claims[-1].is_ours else claims[-1].package
        return (
            f"The scheme {scheme!r} is also claimed by {', '.join(others)}; MLflow silently takes the last "
            f"that it finds, now {winner}.",
            f"Uninstall {' and '.join(others)}, or have them give up the scheme.",
        )
    if not claims:
        return (
            f"No installed package answers for the scheme {scheme!r}.",
            "Install mlflow-safelock in this environment, or use one of its spellings (docs/gate.md).",
        )
    return None


def warn_of_rivals(uri: str) -> None:
    """Say in the log that another installed package claims the scheme of a ``safelock+…`` URI."""
    if any(not claim.is_ours for claim in claims_of(scheme_of(uri))):
        cause, next_step = scheme_fault(uri) or ("", "")
        _logger.warning("%s %s", cause, next_step)


def shown_uri(uri: str) -> str:
    """A URI without its password, and without its query, which may hold one."""
    try:
        url = sa.make_url(uri)
    except (sa.exc.ArgumentError, ValueError):
        scheme = scheme_of(uri)
        return f"{scheme}:…" if scheme and "://" in uri else "(a path)"
    bare: str = url.set(query={}).render_as_string(hide_password=True)
    return f"{bare}?…" if url.query else bare
