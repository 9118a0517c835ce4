"""What a locked checkpoint holds about its source: all that it takes to give the source's files back."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mlflow_safelock.apply.checkpoint.layout import RECORD_FILE
from mlflow_safelock.apply.checkpoint.sample import sampled_digest
from mlflow_safelock.apply.checkpoint.source import CheckpointSource
from mlflow_safelock.apply.checkpoint.weights import INDEX_FILE
from mlflow_safelock.apply.checkpoint.writing import WrittenFile
from mlflow_safelock.errors import CheckpointError
from mlflow_safelock.lock import SafetyLock


def _inside(name: str) -> str:
    # What a record says is not trusted: it must not lead us out of its folder.
    path = PurePosixPath(name)
    plain = path.parts and not path.is_absolute() and not {"..", "\\", "\0"} & {*path.parts, *name}
    if not plain or str(path) != name:
        raise ValueError(f"{name!r} is not the name of a file in its folder")
    return name


_Name = Annotated[str, AfterValidator(_inside)]


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ChangedBytes(_Form):
    """Bytes of a file of weights that the lock changed.

    Attributes:
        begin: Where they begin.
        before: What they were, in base 64.
    """

    begin: Annotated[int, Field(ge=0, lt=1 << 63)]
    before: str


class RecordedWeights(_Form):
    """A file of weights.

    Attributes:
        name: Its name in the source.
        locked_name: Its name in the locked checkpoint.
        sample: Its sampled digest in the source.
        changed: What the lock changed.
    """

    name: _Name
    locked_name: _Name
    sample: str
    changed: tuple[ChangedBytes, ...] = Field(strict=False)


class KeptFile(_Form):
    """A file that the locked checkpoint holds as it is in the source.

    Attributes:
        name: Its name.
        sha256: Its digest.
    """

    name: _Name
    sha256: str


class RewrittenFile(_Form):
    """A file that the locked checkpoint holds in another form.

    Attributes:
        name: Its name.
        content: Its content in the source, in base 64.
    """

    name: _Name
    content: str


class LockRecord(_Form):
    """The record.

    Attributes:
        format_version: 1.
        lock: Digest of the lock.
        base_model: Its base model.
        alpha: Its strength.
        weights: The files of weights.
        kept: Files that are as they were.
        rewritten: Files that are not.
    """

    format_version: Literal[1]
    lock: str
    base_model: str
    alpha: float
    weights: tuple[RecordedWeights, ...] = Field(strict=False)
    kept: tuple[KeptFile, ...] = Field(strict=False)
    rewritten: tuple[RewrittenFile, ...] = Field(strict=False)


def write_record(
    source: CheckpointSource, written: Iterable[WrittenFile], lock: SafetyLock, alpha: float, folder: Path
) -> None:
    """Write the record of a locked checkpoint whose other files are all in ``folder``."""
    originals = {
        **{name: source.layout.model / name for name in ("config.json", "README.md", INDEX_FILE)},
        **source.layout.carried,
    }
    contents = {name: path.read_bytes() for name, path in originals.items() if path.is_file()}
    kept = {name for name, content in contents.items() if _holds(folder / name, content)}
    record = LockRecord(
        format_version=1,
        lock=lock.digest,
        base_model=lock.base_model,
        alpha=alpha,
        weights=tuple(_recorded(source.layout.model, file) for file in written),
        kept=tuple(KeptFile(name=name, sha256=digest_of(contents[name])) for name in sorted(kept)),
        rewritten=tuple(
            RewrittenFile(name=name, content=_text(contents[name])) for name in sorted(set(contents) - kept)
        ),
    )
    (folder / RECORD_FILE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> LockRecord:
    """Read the record of a locked checkpoint.

    Raises:
        CheckpointError: There is none, or it is not one that this version reads.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {RECORD_FILE}, so it does not say what it was before it was locked.",
            next_step="Use a folder that save_locked_checkpoint wrote, or the fine-tune itself.",
        )
    try:
        record = LockRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise CheckpointError(
            f"{path} cannot be read: {place or 'content'}: {fault['msg']}.",
            next_step="Use the fine-tune itself.",
        ) from error
    names = [file.name for file in record.weights]
    names += [file.name for file in record.kept]
    names += [file.name for file in record.rewritten]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path} names a file twice.", next_step="Use the fine-tune itself.")
    return record


def digest_of(content: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _recorded(model: Path, file: WrittenFile) -> RecordedWeights:
    return RecordedWeights(
        name=file.source,
        locked_name=file.name,
        sample=sampled_digest(model / file.source),
        changed=tuple(ChangedBytes(begin=patch.begin, before=_text(patch.before)) for patch in file.patches),
    )


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
