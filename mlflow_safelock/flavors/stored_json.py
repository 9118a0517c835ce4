"""JSON files that lie with a model: small ones, of whoever logged it."""

from __future__ import annotations

import json
from typing import Any

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance import ArtifactReader

MAX_BYTES = 4 << 20
"""Size up to which a configuration is read."""


def read_json(reader: ArtifactReader, path: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is something else in it.

    Args:
        reader: The folder that it lies in.
        path: Its path there.
        max_bytes: Size up to which it is read.

    Raises:
        SourceError: It is larger, cannot be read, is not JSON, or is nested too deeply.
    """
    where = f"The file {path!r} at {reader.location}"
    size = next((file.size for file in reader.files() if file.path == path), 0)
    if size > max_bytes:
        raise SourceError(f"{where} is larger than any of its kind: {size} bytes.", next_step=_ANEW)
    try:
        values = json.loads(reader.read(path))
    except RecursionError as error:
        raise SourceError(f"{where} is nested too deeply.", next_step=_ANEW) from error
    except ValueError as error:
        raise SourceError(f"{where} is not JSON: {error}.", next_step=_ANEW) from error
    return values if isinstance(values, dict) else {}


_ANEW = "Log the model anew with mlflow.transformers.log_model, from a sound copy."
