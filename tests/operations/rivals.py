"""Another installed package that claims a scheme of ours."""

from __future__ import annotations

import os
from pathlib import Path

STORE = """
def make_store(store_uri):
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore
    return SqlAlchemyStore(store_uri.removeprefix("safelock+"))
"""


def rival_package(folder: Path, scheme: str) -> str:
    """Make one below ``folder``; the ``PYTHONPATH`` with which it is installed."""
    metadata = folder / "rival_store-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "rival_store.py").write_text(STORE, encoding="utf-8")
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: rival-store\nVersion: 1.0\n", encoding="utf-8"
    )
    (metadata / "entry_points.txt").write_text(
        f"[mlflow.model_registry_store]\n{scheme} = rival_store:make_store\n", encoding="utf-8"
    )
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
