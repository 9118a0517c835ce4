"""A folder on S3 or on a store that speaks its protocol, read in parts with ranged requests."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import urlparse

import boto3
from botocore import UNSIGNED
from botocore.client import Config
from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError
from mlflow.environment_variables import (
    MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE,
    MLFLOW_S3_ENDPOINT_URL,
    MLFLOW_S3_EXPECTED_BUCKET_OWNER,
    MLFLOW_S3_IGNORE_TLS,
    MLFLOW_S3_UPLOAD_EXTRA_ARGS,
)

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance import ArtifactFile, Span, StoreChecksum
from mlflow_safelock.registry.ranges import PARALLEL_FILES, PARALLEL_REQUESTS, read_spans
from mlflow_safelock.registry.s3_errors import s3_errors

SCHEME = "s3"

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0

KEPT_BYTES = 1 << 20
"""The beginning of a file, once read, is kept up to this size: headers and small files are read again."""

DESCRIBED_FROM_BYTES = 1 << 20
"""The store is asked for version and checksum of files above this size; smaller ones are compared whole."""

BODY_ATTEMPTS = 3
"""How often an answer is asked for whose body breaks off; the client only repeats what fails before that."""


def s3_client(read_seconds: float = READ_SECONDS) -> Any:
    """The S3 client of this process, from the settings that MLflow's own artifact repository follows.

    How often it repeats a failing request is the client's own setting: ``AWS_MAX_ATTEMPTS``, 5 by default.
    MLflow's factory is not used since its connections are fewer than the requests that are made at once.
    """
    return _client(
        MLFLOW_S3_ENDPOINT_URL.get(),
        bool(MLFLOW_S3_IGNORE_TLS.get()),
        os.environ.get("MLFLOW_EXPERIMENTAL_S3_SIGNATURE_VERSION", "s3v4"),
        MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE.get(),
        read_seconds,
    )


@lru_cache(maxsize=16)
def _client(
    endpoint: str | None, ignore_tls: bool, signature: str, addressing: str, read_seconds: float
) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        verify=False if ignore_tls else None,
        config=Config(
            signature_version=UNSIGNED if signature.lower() == "unsigned" else signature,
            s3={"addressing_style": addressing},
            max_pool_connections=PARALLEL_REQUESTS + PARALLEL_FILES,
            connect_timeout=CONNECT_SECONDS,
            read_timeout=read_seconds,
        ),
    )


def bucket_owner() -> dict[str, str]:
    """The owner that a bucket must have, as MLflow is told it."""
    owner = MLFLOW_S3_EXPECTED_BUCKET_OWNER.get()
    return {"ExpectedBucketOwner": owner} if owner else {}


def upload_settings() -> Mapping[str, Any]:
    """What MLflow is told to give with every upload, such as the encryption."""
    given = MLFLOW_S3_UPLOAD_EXTRA_ARGS.get()
    return dict(json.loads(given)) if given else {}


@dataclass(frozen=True)
class S3Artifacts:
    """An artifact folder on S3, as it is when it is first listed: a file that changes later is an error.

    Attributes:
        uri: ``s3://bucket/prefix``.
        client: The client.
    """

    uri: str
    client: Any = field(default_factory=s3_client)

    @property
    def location(self) -> str:
        """The folder's URI."""
        return self.uri

    @property
    def parallel_files(self) -> int:
        """As many as keep the line busy."""
        return PARALLEL_FILES

    @property
    def reads_parts(self) -> bool:
        """Yes, by ranged requests."""
        return True

    @property
    def bucket(self) -> str:
        """The bucket."""
        return urlparse(self.uri).netloc

    def key(self, path: str) -> str:
        """The key of a file of the folder."""
        return posixpath.join(urlparse(self.uri).path.strip("/"), path)

    def files(self) -> tuple[ArtifactFile, ...]:
        """Every file below the folder, sorted by path; listed once."""
        return tuple(self._listing.values())

    def file(self, path: str) -> ArtifactFile:
        """One file of the listing.

        Raises:
            SourceError: There is none.
        """
        if path not in self._listing:
            raise SourceError(f"There is no file {path!r} at {self.uri}.")
        return self._listing[path]

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file from ``start``, ``length`` of them or up to its end, by one ranged request."""
        size = self.file(path).size
        end = size if length is None else start + length
        if end > size:
            raise SourceError(f"{self._name(path)} ends at byte {size}, before {end}: it is cut off.")
        beginning = self._beginnings.get(path, b"")
        if end <= len(beginning) or end <= start:
            return beginning[start:end]
        data = self._get(path, start, end - start)
        if start == 0 and len(beginning) < len(data) <= KEPT_BYTES:
            self._beginnings[path] = data
        return data

    def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of several parts of one file: neighbours by one request, several requests at once."""
        return read_spans(lambda start, length: self.read(path, start, length), spans, lambda: self._executor)

    def _get(self, path: str, start: int, length: int) -> bytes:
        checksum = self.file(path).checksum
        with s3_errors(self._name(path)):
            for attempt in range(1, BODY_ATTEMPTS + 1):
                answer = self.client.get_object(
                    Bucket=self.bucket,
                    Key=self.key(path),
                    Range=f"bytes={start}-{start + length - 1}",
                    **({"IfMatch": checksum.etag} if checksum else {}),
                    **bucket_owner(),
                )
                try:
                    data: bytes = answer["Body"].read()
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    if attempt == BODY_ATTEMPTS:
                        raise
                    continue
                if len(data) == length:
                    return data
        raise SourceError(
            f"{self._name(path)} gave {len(data)} bytes in place of the {length} from byte {start}.",
            next_step="Look whether the store, or a proxy before it, honours the Range header.",
        )

    def _name(self, path: str) -> str:
        return f"The file {path!r} at {self.uri}"

    @cached_property
    def _beginnings(self) -> dict[str, bytes]:
        return {}

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="safelock-s3")

    @cached_property
    def _listing(self) -> dict[str, ArtifactFile]:
        prefix = self.key("")
        found: dict[str, ArtifactFile] = {}
        with s3_errors(f"The folder {self.uri}"):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix, **bucket_owner()
            )
            for entry in (entry for page in pages for entry in page.get("Contents", [])):
                path = entry["Key"].removeprefix(prefix)
                if not path.endswith("/"):  # such a key stands for an empty folder
                    found[path] = ArtifactFile(path, entry["Size"], StoreChecksum(etag=entry["ETag"]))
        if not found:
            raise SourceError(
                f"There are no files at {self.uri}.", next_step="Look whether the model was deleted or moved."
            )
        large = [file for file in found.values() if file.size > DESCRIBED_FROM_BYTES]
        described = (
            self._executor.map(self._describe, large) if len(large) > 1 else map(self._describe, large)
        )
        found.update((file.path, file) for file in described)
        return dict(sorted(found.items()))

    def _describe(self, file: ArtifactFile) -> ArtifactFile:
        """The file with all that the store says of it."""
        with s3_errors(self._name(file.path)):
            head = self.client.head_object(
                Bucket=self.bucket, Key=self.key(file.path), ChecksumMode="ENABLED", **bucket_owner()
            )
        checksum = StoreChecksum(
            etag=head["ETag"], version_id=head.get("VersionId"), sha256=head.get("ChecksumSHA256")
        )
        return ArtifactFile(file.path, head["ContentLength"], checksum)
