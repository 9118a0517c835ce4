"""What a folder of artifacts holds, in a few bytes: for a ledger's row, which has no room for a fingerprint.

The parts that are compared are the ones of a fingerprint, drawn by a seed: so the seed and one digest say it
all. Which file differs cannot be told from them. Where a store gives whole files only, nothing is read of
large ones, and their sizes have to do: a version that was let through is compared at reads.
"""

from __future__ import annotations

import hashlib
import random
import secrets
from typing import Annotated

import rfc8785
from pydantic import BaseModel, ConfigDict, Field

from mlflow_safelock.lock import Digest
from mlflow_safelock.provenance.artifacts import ArtifactFile, ArtifactReader
from mlflow_safelock.provenance.fingerprint import (
    WHOLE_FILE_BYTES,
    for_each,
    hash_spans,
    model_files,
    spans_to_compare,
)

BEGINNING_BYTES = 4 << 20
"""How much of the beginning of a large file is read, where that is not safetensors.

What kind of model is in a pickle stands there, in a few bytes that no block would hit.
"""


class Contents(BaseModel):
    """What was in a folder.

    Attributes:
        seed: 32 hexadecimal digits that decide which blocks of large files were read.
        digest: ``sha256:…`` over the path, the size and the read bytes of every file.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    seed: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    digest: Digest

    def are_in(self, reader: ArtifactReader) -> bool:
        """Whether a folder holds the same, as far as was read.

        Raises:
            SourceError: The folder is empty, or something in it cannot be read.
        """
        return contents_of(reader, self.seed) == self


def contents_of(reader: ArtifactReader, seed: str | None = None) -> Contents:
    """Read a folder as a fingerprint does, and more of beginnings; of a store of whole files, the small ones.

    Args:
        reader: The folder.
        seed: Decides which blocks; drawn anew where not given.

    Raises:
        SourceError: The folder is empty, or something in it cannot be read.
    """
    chosen = seed or secrets.token_hex(16)

    def read(file: ArtifactFile) -> list[str | int]:
        if file.size > WHOLE_FILE_BYTES and not reader.reads_parts:
            return [file.path, file.size]
        draw = random.Random(f"{chosen} {file.path}")  # noqa: S311 - the seed is drawn by secrets
        spans = spans_to_compare(reader, file.path, file.size, draw.randrange)
        if file.size > WHOLE_FILE_BYTES and not file.path.endswith(".safetensors"):
            spans = ((0, min(file.size, BEGINNING_BYTES)), *spans)
        return [file.path, file.size, hash_spans(reader, file.path, spans)]

    listed = rfc8785.dumps(for_each(reader, model_files(reader), read))
    return Contents(seed=chosen, digest=f"sha256:{hashlib.sha256(listed).hexdigest()}")
