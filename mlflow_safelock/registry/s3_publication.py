"""Writing a model folder to S3, of small files and of objects that the store itself copies.

S3 has no folders to rename, so the MLmodel file, which makes a folder a model, is written last, and whatever
was written before an error is deleted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from mimetypes import guess_type
from pathlib import Path
from types import TracebackType
from typing import Any

from mlflow.environment_variables import MLFLOW_S3_UPLOAD_EXTRA_ARGS
from mlflow.models.model import MLMODEL_FILE_NAME

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance import ArtifactFile
from mlflow_safelock.registry.ranges import PARALLEL_REQUESTS
from mlflow_safelock.registry.s3 import S3Artifacts, bucket_owner
from mlflow_safelock.registry.s3_errors import s3_errors

MAX_WHOLE_COPY_BYTES = 5 << 30
"""Largest object that S3 copies in one request."""

PART_BYTES = 512 << 20
"""Size of one part of a larger copy."""

SMALL_BYTES = 8 << 20
"""Up to this size a file is read whole and written by one request."""

MAX_PARTS = 10_000
"""Most parts that S3 puts together."""


@dataclass
class S3Publication:
    """A model folder that is being written; as a context manager it ends up complete, or not there at all.

    ::

        with S3Publication(S3Artifacts(uri)) as publication:
            publication.copy_from(source, "model/model-00001-of-00002.safetensors")
            publication.put("MLmodel", text)

    Attributes:
        destination: Where it is written.
        whole_copy_bytes: Largest object that is copied in one request.
        part_bytes: Size of one part of a larger copy; at least 5 MiB on S3.
    """

    destination: S3Artifacts
    whole_copy_bytes: int = MAX_WHOLE_COPY_BYTES
    part_bytes: int = PART_BYTES
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
        settings = {"ContentType": "application/octet-stream", **_upload_settings()}
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

    def copy_from(self, source: S3Artifacts, path: str, to: str | None = None) -> None:
        """Let the store copy a file of ``source``, of which nothing passes through this process.

        Args:
            source: A folder on the same store.
            path: The file in it.
            to: Path in the new folder, where it is another one.

        Raises:
            SourceError: It cannot be copied, or it changed meanwhile.
        """
        file, target = source.file(path), to or path
        what = f"The file {path!r} at {source.uri}, being copied to {self.destination.uri},"
        self._written.append(target)
        with s3_errors(what):
            if file.size <= self.whole_copy_bytes:
                self._client.copy_object(
                    **self._place(target), **_copied(source, file), **bucket_owner(), **_upload_settings()
                )
            else:
                self._copy_in_parts(source, file, target)
            # Not every store heeds the condition of a copy, and all heed that of a question.
            unchanged = {"IfMatch": file.checksum.etag} if file.checksum else {}
            source.client.head_object(
                Bucket=source.bucket, Key=source.key(path), **unchanged, **bucket_owner()
            )
            copied = self._client.head_object(**self._place(target), **bucket_owner())["ContentLength"]
        if copied != file.size:
            raise SourceError(
                f"{what} has {copied} bytes there and {file.size} here.", next_step="Do it again."
            )

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
                **{"ContentType": guess_type(path)[0] or "application/octet-stream", **_upload_settings()},
                **bucket_owner(),
            )

    def _copy_in_parts(self, source: S3Artifacts, file: ArtifactFile, target: str) -> None:
        place = {**self._place(target), **bucket_owner()}
        upload = self._client.create_multipart_upload(**place, **_upload_settings())["UploadId"]
        size = max(self.part_bytes, -(-file.size // MAX_PARTS))

        def copy_part(start: int) -> dict[str, Any]:
            number = start // size + 1
            answer = self._client.upload_part_copy(
                **place,
                **_copied(source, file),
                UploadId=upload,
                PartNumber=number,
                CopySourceRange=f"bytes={start}-{min(start + size, file.size) - 1}",
            )
            return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

        try:
            with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
                parts = list(pool.map(copy_part, range(0, file.size, size)))
            self._client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._client.abort_multipart_upload(**place, UploadId=upload)
            raise

    def _delete(self) -> None:
        """Delete what was written, unless another process has completed the same folder meanwhile."""
        with contextlib.suppress(Exception):  # here and below: the error that led here is the one to tell
            if MLMODEL_FILE_NAME not in self._written and self._is_complete():
                return
        for path in reversed(self._written):  # the MLmodel file first
            with contextlib.suppress(Exception):
                self._client.delete_object(**self._place(path), **bucket_owner())

    def _is_complete(self) -> bool:
        answer = self._client.list_objects_v2(
            Bucket=self.destination.bucket,
            Prefix=self.destination.key(MLMODEL_FILE_NAME),
            MaxKeys=1,
            **bucket_owner(),
        )
        return bool(answer.get("KeyCount"))


def _copied(source: S3Artifacts, file: ArtifactFile) -> dict[str, Any]:
    owner = bucket_owner().get("ExpectedBucketOwner")
    return {
        "CopySource": {"Bucket": source.bucket, "Key": source.key(file.path)},
        **({"CopySourceIfMatch": file.checksum.etag} if file.checksum else {}),
        **({"ExpectedSourceBucketOwner": owner} if owner else {}),
    }


def _upload_settings() -> Mapping[str, Any]:
    """What MLflow is told to give with every upload, such as the encryption."""
    given = MLFLOW_S3_UPLOAD_EXTRA_ARGS.get()
    return dict(json.loads(given)) if given else {}
