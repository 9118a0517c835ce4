"""What the in-toto statements of this package have in common; each names its own subject and predicate."""

from __future__ import annotations

from typing import Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field


class Form(BaseModel):
    """A part of a statement: strict, and never changed."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", populate_by_name=True)


class Statement(Form):
    """An in-toto statement (https://in-toto.io/Statement/v1), but for what it is about."""

    type_: Literal["https://in-toto.io/Statement/v1"] = Field(
        default="https://in-toto.io/Statement/v1", alias="_type"
    )

    def to_bytes(self) -> bytes:
        """The statement as canonical JSON (RFC 8785)."""
        return rfc8785.dumps(self.model_dump(mode="json", by_alias=True))
