"""Versions in MLflow's tables as the gate sees and changes them: statements that are put together once.

MLflow's own classes for its rows fetch what belongs to a version one after the other when it is looked at,
which takes a promotion several times as long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL
from mlflow.entities.model_registry.model_version_status import ModelVersionStatus
from mlflow.store.model_registry.dbmodels.models import (
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModel,
    SqlRegisteredModelAlias,
    SqlRegisteredModelTag,
)
from sqlalchemy.orm import Session

from mlflow_safelock.gate.ports import ModelVersion


def _of_model(*columns: Any) -> sa.Select[Any]:
    """Columns of what belongs to one registered model, which is named by its workspace and name."""
    table = columns[0].class_
    return sa.select(*columns).where(
        table.workspace == sa.bindparam("workspace"), table.name == sa.bindparam("name")
    )


_VERSIONS = (
    _of_model(
        SqlModelVersion.version,
        SqlModelVersion.source,
        SqlModelVersion.storage_location,
        SqlModelVersion.current_stage,
        SqlModelVersion.creation_time,
        # Not the row's own name: a version may be registered by another spelling of its model's.
        SqlRegisteredModel.name,
    )
    .join(
        SqlRegisteredModel,
        sa.and_(
            SqlRegisteredModel.workspace == SqlModelVersion.workspace,
            SqlRegisteredModel.name == SqlModelVersion.name,
        ),
    )
    .where(SqlModelVersion.current_stage != STAGE_DELETED_INTERNAL)
)
ONE = _VERSIONS.where(SqlModelVersion.version == sa.bindparam("version"))
"""The version with a number; it takes ``version`` beside the name."""

READY = _VERSIONS.where(
    SqlModelVersion.status == ModelVersionStatus.to_string(ModelVersionStatus.READY)
).order_by(SqlModelVersion.version)
"""The versions that are ready, oldest first."""

NEWEST_READY = READY.order_by(None).order_by(SqlModelVersion.version.desc()).limit(1)
"""The last of them."""

_TAGS = _of_model(SqlModelVersionTag.version, SqlModelVersionTag.key, SqlModelVersionTag.value)
_TAGS_OF_ONE = _TAGS.where(SqlModelVersionTag.version == sa.bindparam("version"))
_MODEL_TAGS = _of_model(SqlRegisteredModelTag.key, SqlRegisteredModelTag.value)
_ALIASES = _of_model(SqlRegisteredModelAlias.version, SqlRegisteredModelAlias.alias)


def is_at(location: Any) -> sa.ColumnElement[bool]:
    """Whether a version is downloaded from a location."""
    at: sa.ColumnElement[bool] = (
        sa.func.coalesce(SqlModelVersion.storage_location, SqlModelVersion.source) == location
    )
    return at


REDIRECTING = (
    sa.update(SqlModelVersion.__table__)
    .where(
        SqlModelVersion.workspace == sa.bindparam("of_workspace"),
        SqlModelVersion.name == sa.bindparam("of_name"),
        SqlModelVersion.version == sa.bindparam("of_version"),
        SqlModelVersion.current_stage != STAGE_DELETED_INTERNAL,
        is_at(sa.bindparam("expected")),
    )
    .values(storage_location=sa.bindparam("location"), last_updated_time=sa.bindparam("now"))
)
"""Lets a version be downloaded from ``location`` since ``now``, where it is from ``expected`` so far."""

UNTAGGING = sa.delete(SqlModelVersionTag.__table__).where(
    SqlModelVersionTag.workspace == sa.bindparam("of_workspace"),
    SqlModelVersionTag.name == sa.bindparam("of_name"),
    SqlModelVersionTag.version == sa.bindparam("of_version"),
    SqlModelVersionTag.key.in_(sa.bindparam("keys", expanding=True)),
)
"""Takes the tags with some ``keys`` off a version."""

TAGGING = sa.insert(SqlModelVersionTag.__table__)
"""Puts a tag on a version."""


def read_versions(
    session: Session, chosen: sa.Select[Any], named: Mapping[str, str | int]
) -> list[ModelVersion]:
    """The versions that a statement chooses, in its order, with all that belongs to them.

    Args:
        session: A session of the registry's database.
        chosen: ``ONE``, ``READY`` or ``NEWEST_READY``.
        named: ``workspace`` and ``name`` of the registered model, and what else the statement takes.
    """
    rows = session.execute(chosen, named).all()
    if not rows:
        return []
    of_one = {**named, "version": rows[0].version}
    found = session.execute(_TAGS, named) if len(rows) > 1 else session.execute(_TAGS_OF_ONE, of_one)
    tags: dict[int, dict[str, str]] = defaultdict(dict)
    for tag in found:
        tags[tag.version][tag.key] = tag.value
    aliases: dict[int, list[str]] = defaultdict(list)
    for alias in session.execute(_ALIASES, named):
        aliases[alias.version].append(alias.alias)
    model_tags = {tag.key: tag.value for tag in session.execute(_MODEL_TAGS, named)}
    return [
        ModelVersion(
            name=row.name,
            version=row.version,
            source=row.source,
            location=row.storage_location or row.source,
            tags=tags[row.version],
            stage=row.current_stage,
            aliases=tuple(sorted(aliases[row.version])),
            model_tags=model_tags,
            created=row.creation_time,
        )
        for row in rows
    ]
