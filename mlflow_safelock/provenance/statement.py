"""What the in-toto statements of this package have in common; each names its own subject and predicate."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


class Grown(BaseModel):
    """A form that got further fields after the first of its kind were written.

    Those are left out where they have their default, so that older ones read back to the same bytes.
    """

    further: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_what_is_not_stated(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        kept = type(self).model_fields
        for name in self.further:
            if getattr(self, name) == kept[name].default:
                values.pop(name, None)
        return values


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
