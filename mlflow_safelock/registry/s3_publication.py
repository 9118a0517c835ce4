"""Writing a model folder to S3.

S3 has no folders to rename, so the MLmodel file, which makes a folder a model, is written last, and whatever
was written before an error is deleted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from mimetypes import guess_type
from pathlib import Path
from types import TracebackType
from typing import Any

from mlflow.models.model import MLMODEL_FILE_NAME

from mlflow_safelock.registry.s3 import S3Artifacts, bucket_owner, upload_settings
from mlflow_safelock.registry.s3_errors import s3_errors

SMALL_BYTES = 8 << 20
"""Up to this size a file is read whole and written by one request."""


@dataclass
class S3Publication:
    """A model folder that is being written; as a context manager it ends up complete, or not there at all.

    ::

        with S3Publication(S3Artifacts(uri)) as publication:
            publication.put("MLmodel", text)
            publication.put("model/config.json", config)

    Attributes:
        destination: Where it is written.
    """

    destination: S3Artifacts
    _written: list[str] = field(default_factory=list, init=False)
    _mlmodel: bytes | None = field(default=None, init=False)

    def __enter__(self) -> S3Publication:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self._mlmodel is not None:
                self._put(MLMODEL_FILE_NAME, self._mlmodel)
        except BaseException:
            self._delete()
            raise
        if error is not None:
            self._delete()

    def put(self, path: str, data: bytes) -> None:
        """Write a small file; the MLmodel file waits until all else is written.

        Raises:
            SourceError: It cannot be written.
        """
        if path == MLMODEL_FILE_NAME:
            self._mlmodel = data
        else:
            self._put(path, data)

    def put_file(self, path: str, file: Path) -> None:
        """Write a local file of any size, in parts where it is large.

        Raises:
            SourceError: It cannot be written.
        """
        if file.stat().st_size <= SMALL_BYTES:
            self.put(path, file.read_bytes())
            return
        self._written.append(path)
        settings = {"ContentType": "application/octet-stream", **upload_settings()}
        place = self._place(path)
        with s3_errors(f"The file {path!r} to be written at {self.destination.uri}"):
            self._client.upload_file(
                str(file), place["Bucket"], place["Key"], ExtraArgs={**settings, **bucket_owner()}
            )

    def put_folder(self, folder: Path) -> None:
        """Write every file of a local folder.

        Raises:
            SourceError: One cannot be written.
        """
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put_file(path.relative_to(folder).as_posix(), path)

    @property
    def _client(self) -> Any:
        return self.destination.client

    def _place(self, path: str) -> dict[str, str]:
        return {"Bucket": self.destination.bucket, "Key": self.destination.key(path)}

    def _put(self, path: str, data: bytes) -> None:
        self._written.append(path)
        with s3_errors(f"The file {path!r} to be written at {self.destination.uri}"):
            self._client.put_object(
                **self._place(path),
                Body=data,
                **{"ContentType": guess_type(path)[0] or "application/octet-stream", **upload_settings()},
                **bucket_owner(),
            )

    def _delete(self) -> None:
        """Delete what was written, unless another process has completed the same folder meanwhile."""
        with contextlib.suppress(Exception):  # here and below: the error that led here is the one to tell
            if MLMODEL_FILE_NAME not in self._written and self._is_complete():
                return
        for path in reversed(self._written):  # the MLmodel file first
            with contextlib.suppress(Exception):
                self._client.delete_object(**self._place(path), **bucket_owner())

    def _is_complete(self) -> bool:
        key = self.destination.key(MLMODEL_FILE_NAME)
        answer = self._client.list_objects_v2(  # of keys with this beginning, it is the first
            Bucket=self.destination.bucket, Prefix=key, MaxKeys=1, **bucket_owner()
        )
        return [entry["Key"] for entry in answer.get("Contents", [])] == [key]
