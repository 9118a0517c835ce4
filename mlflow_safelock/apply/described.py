"""Architectures that the table does not know, described by their users in a few lines.

In a Python program, ``register_architecture`` takes a description. For a server or a command line the file
that ``SAFELOCK_ARCHITECTURES`` names holds them::

    architectures:
      - model_type: my_decoder
        layers: model.layers
        output_projection: self_attn.o_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlflow_safelock.apply.description import Architecture
from mlflow_safelock.apply.table import ARCHITECTURES
from mlflow_safelock.documents import Document, read_document
from mlflow_safelock.errors import UnsupportedArchitectureError
from mlflow_safelock.settings import read_settings

VARIABLE = "SAFELOCK_ARCHITECTURES"
"""Environment variable that names a file of descriptions."""

HOW_TO_DESCRIBE = (
    f"Describe it in a file that {VARIABLE} names, or to register_architecture, such as: "
    "architectures: "
    "[{{model_type: {model_type}, layers: model.layers, output_projection: self_attn.o_proj}}]. "
    "See docs/applying.md, 'An architecture that the table does not know'."
)
"""The next step where an architecture is not known."""

_registered: dict[str, Architecture] = {}


class _File(BaseModel):
    """What a file of descriptions holds."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    architectures: Annotated[tuple[Architecture, ...], Field(min_length=1)]


def register_architecture(description: Architecture | Mapping[str, Any]) -> Architecture:
    """Make an architecture known to this process, for as long as it runs.

    Whenever a model of it is loaded and used, adding ``v`` to the input of what is described as its output
    projection is compared with adding ``W v`` to its output. That it is the heads' outputs that come in there
    is taken from the description.

    Args:
        description: The description, or its fields; see ``Architecture``.

    Returns:
        The description.

    Raises:
        UnsupportedArchitectureError: A field is missing, not known or of the wrong type, or the architecture
            is known already and described otherwise.

    Example:
        ::

            register_architecture(
                {"model_type": "my_decoder", "layers": "model.layers", "output_projection": "attn.out"}
            )
    """
    described = description if isinstance(description, Architecture) else _validated(description)
    fault = _fault(described, {**ARCHITECTURES, **_registered})
    if fault and _registered.get(described.model_type) != described:
        raise UnsupportedArchitectureError(f"The description of an architecture cannot be used: {fault}.")
    _registered[described.model_type] = described
    return described


def described_architectures() -> Mapping[str, Architecture]:
    """What was registered, and what the file of ``SAFELOCK_ARCHITECTURES`` describes, by ``model_type``.

    Raises:
        UnsupportedArchitectureError: The file cannot be read, or a description in it cannot be used; with the
            line.
    """
    path = read_settings().architectures
    if path is None:
        return _registered
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnsupportedArchitectureError(
            f"The file of architectures {path} cannot be read: {error}.",
            next_step=f"Set {VARIABLE} to a readable file, or unset it.",
        ) from error
    return {**_parsed(data, str(path)), **_registered}


@lru_cache(maxsize=4)
def _parsed(data: bytes, path: str) -> Mapping[str, Architecture]:
    document = read_document(data, f"The file of architectures {path}", UnsupportedArchitectureError)
    found: dict[str, Architecture] = {}
    for index, described in enumerate(document.parsed(_File).architectures):
        fault = _fault(described, {**ARCHITECTURES, **found})
        if fault:
            raise UnsupportedArchitectureError(f"{_line_of(document, index)}: {fault}.")
        found[described.model_type] = described
    return found


def _line_of(document: Document, index: int) -> str:
    return document.where(("architectures", index, "model_type"))


def _validated(fields: Mapping[str, Any]) -> Architecture:
    if not isinstance(fields, Mapping):
        raise UnsupportedArchitectureError(
            f"The description of an architecture is of type {type(fields).__name__!r}, and not a mapping.",
            next_step=f"Its fields are: {', '.join(Architecture.model_fields)}.",
        )
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        return Architecture.model_validate(plain)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)
        )
        raise UnsupportedArchitectureError(
            f"The description of an architecture cannot be used: {faults}.",
            next_step=f"Its fields are: {', '.join(Architecture.model_fields)}.",
        ) from error


def _fault(described: Architecture, known: Mapping[str, Architecture]) -> str:
    """What is wrong with a description, beyond the types of its fields; empty where nothing is."""
    if described.model_type in known:
        return f"model type {described.model_type!r} is known already"
    if described.standalone == "rewritten":
        return "standalone cannot be rewritten: that the two compute the same has to be shown by tests"
    flag = described.output_bias not in ("always", "never")
    if described.standalone == "flag" and not flag:
        return f"standalone is flag, and output_bias names none, but is {described.output_bias}"
    if described.standalone == "own_bias" and described.output_bias == "never":
        return "standalone is own_bias, and output_bias is never"
    return ""
