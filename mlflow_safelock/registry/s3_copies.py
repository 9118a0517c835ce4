"""Files of weights that the store itself copies, and that a run which was cut off need not copy again.

A copy carries in its metadata what it was made of: the source's ETag, and the biases that differ. So a later
run knows a finished one, and a source that changed meanwhile makes another. A file with other biases is put
together by the store, too: of stretches of the source, and of small uploaded parts around the biases.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from mlflow_safelock.apply.checkpoint.progress import Meter, Progress
from mlflow_safelock.errors import SourceError
from mlflow_safelock.flavors.standalone import Patches, WeightsFile
from mlflow_safelock.provenance import ArtifactFile
from mlflow_safelock.registry.s3 import S3Artifacts, bucket_owner, upload_settings
from mlflow_safelock.registry.s3_errors import s3_errors

PARALLEL_COPIES = 4
"""How many files are copied at once."""

PARALLEL_PARTS = 4
"""How many parts of one file are copied at once."""

WHOLE_COPY_BYTES = 1 << 30
"""Largest object that is copied in one request: S3 takes up to 5 GiB, and tells nothing while it copies."""

PART_BYTES = 256 << 20
"""Size of one part of a larger copy."""

LEAST_PART_BYTES = 5 << 20
"""Smallest part that S3 takes, but for the last of a file."""

MAX_PARTS = 5_000
"""Most parts that one file is cut into for its size; S3 takes 10,000, and biases make some more."""

MADE_OF = "safelock-made-of"
"""Name of the metadata that say what a copy was made of."""


@dataclass(frozen=True)
class Part:
    """A part of a file that the store puts together.

    Attributes:
        start: First byte.
        end: The one after the last.
        uploaded: Whether this process sends it; otherwise the store copies it.
    """

    start: int
    end: int
    uploaded: bool


@dataclass(frozen=True)
class S3Copies:
    """Copies of files of one folder in another of the same store.

    Attributes:
        source: The fine-tune.
        destination: Where the copies go.
        whole_copy_bytes: Largest object that is copied in one request.
        part_bytes: Size of one part of a larger copy; at least 5 MiB on S3.
    """

    source: S3Artifacts
    destination: S3Artifacts
    whole_copy_bytes: int = WHOLE_COPY_BYTES
    part_bytes: int = PART_BYTES

    def make(self, wanted: Sequence[WeightsFile], progress: Progress) -> None:
        """Make the copies that are not there yet, several at once; finished ones stay, whatever fails.

        Raises:
            SourceError: A file cannot be copied, or it changed meanwhile.
        """
        total = sum(self.source.file(file.origin).size for file in wanted)
        meter = Meter("Copying the weights", total, progress)
        with ThreadPoolExecutor(PARALLEL_COPIES) as pool:
            running = [pool.submit(self._copy, file, meter) for file in wanted]
            try:
                for copy in as_completed(running):
                    copy.result()
            except SourceError as error:
                raise SourceError(
                    error.cause,
                    next_step=f"{error.next_step} Doing it again goes on: what was copied to "
                    f"{self.destination.uri} is kept.",
                ) from error
            finally:
                for copy in running:
                    copy.cancel()

    def _copy(self, wanted: WeightsFile, meter: Meter) -> None:
        file = self.source.file(wanted.origin)
        what = f"The file {wanted.origin!r} at {self.source.uri}, being copied to {self.destination.uri},"
        made_of = _made_of(file, wanted.patches)
        with s3_errors(what):
            if self._is_there(wanted.path, file.size, made_of):
                meter.add(file.size)
                return
            settings = _settings(made_of)
            if wanted.patches or file.size > self.whole_copy_bytes:
                self._put_together(wanted, file, settings, meter)
            else:
                self._client.copy_object(
                    **self._place(wanted.path),
                    **self._copied(file),
                    **settings,
                    MetadataDirective="REPLACE",
                )
                meter.add(file.size)
            try:
                self._refuse_changed(file)
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    self._client.delete_object(**self._place(wanted.path))
                raise
            if not self._is_there(wanted.path, file.size, made_of):
                raise SourceError(
                    f"{what} is not there afterwards as it was made.", next_step="Look at the store."
                )

    def _refuse_changed(self, file: ArtifactFile) -> None:
        """Ask for a file as it was listed: not every store heeds that condition when it copies."""
        unchanged = {"IfMatch": file.checksum.etag} if file.checksum else {}
        self.source.client.head_object(
            Bucket=self.source.bucket, Key=self.source.key(file.path), **unchanged, **bucket_owner()
        )

    def _is_there(self, path: str, size: int, made_of: str) -> bool:
        try:
            found = self._client.head_object(**self._place(path))
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                return False
            raise
        return bool(found["ContentLength"] == size and found.get("Metadata", {}).get(MADE_OF) == made_of)

    def _put_together(
        self, wanted: WeightsFile, file: ArtifactFile, settings: dict[str, Any], meter: Meter
    ) -> None:
        place = self._place(wanted.path)
        upload = self._client.create_multipart_upload(**place, **settings)["UploadId"]

        def put(numbered: tuple[int, Part]) -> dict[str, Any]:
            number, part = numbered
            named = {**place, "UploadId": upload, "PartNumber": number}
            if part.uploaded:
                data = self.source.read(file.path, part.start, part.end - part.start)
                etag = self._client.upload_part(**named, Body=wanted.locked(part.start, data))["ETag"]
            else:
                answer = self._client.upload_part_copy(
                    **named, **self._copied(file), CopySourceRange=f"bytes={part.start}-{part.end - 1}"
                )
                etag = answer["CopyPartResult"]["ETag"]
            meter.add(part.end - part.start)
            return {"PartNumber": number, "ETag": etag}

        try:
            with ThreadPoolExecutor(PARALLEL_PARTS) as pool:
                parts = list(
                    pool.map(put, enumerate(parts_of(file.size, wanted.patches, self.part_bytes), start=1))
                )
            self._client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._client.abort_multipart_upload(**place, UploadId=upload)
            raise

    @property
    def _client(self) -> Any:
        return self.destination.client

    def _place(self, path: str) -> dict[str, str]:
        return {"Bucket": self.destination.bucket, "Key": self.destination.key(path), **bucket_owner()}

    def _copied(self, file: ArtifactFile) -> dict[str, Any]:
        owner = bucket_owner().get("ExpectedBucketOwner")
        return {
            "CopySource": {"Bucket": self.source.bucket, "Key": self.source.key(file.path)},
            **({"CopySourceIfMatch": file.checksum.etag} if file.checksum else {}),
            **({"ExpectedSourceBucketOwner": owner} if owner else {}),
        }


def parts_of(size: int, patches: Patches, part_bytes: int = PART_BYTES) -> list[Part]:
    """Cut a file into parts, in order: what differs is uploaded, with as much around it as S3 asks for.

    Args:
        size: Bytes of the file.
        patches: What differs; disjoint.
        part_bytes: Size of a large part.
    """
    uploaded: list[tuple[int, int]] = []
    for begin, new in sorted(patches):
        start = begin if begin >= LEAST_PART_BYTES else 0
        end = min(size, max(begin + len(new), start + LEAST_PART_BYTES))
        if uploaded and start - uploaded[-1][1] < LEAST_PART_BYTES:  # too little for a part in between
            uploaded[-1] = (uploaded[-1][0], max(end, uploaded[-1][1]))
        else:
            uploaded.append((start, end))
    step = max(part_bytes, -(-size // MAX_PARTS))
    parts: list[Part] = []
    place = 0
    for start, end in uploaded:
        parts += _cut(Part(place, start, False), step)
        parts += _cut(Part(start, end, True), LEAST_PART_BYTES)
        place = end
    return [*parts, *_cut(Part(place, size, False), step)]


def _cut(part: Part, step: int) -> Iterator[Part]:
    """A part in pieces of the same size, of ``step`` to twice that; nothing where it is empty."""
    length = part.end - part.start
    pieces = max(1, length // step) if length else 0
    for number in range(pieces):
        start = part.start + length * number // pieces
        yield Part(start, part.start + length * (number + 1) // pieces, part.uploaded)


def _made_of(file: ArtifactFile, patches: Patches) -> str:
    state = hashlib.sha256(f"{file.size} {file.checksum.etag if file.checksum else ''}".encode())
    for begin, new in patches:
        state.update(f" {begin} {len(new)} ".encode())
        state.update(new)
    return state.hexdigest()


def _settings(made_of: str) -> dict[str, Any]:
    given = dict(upload_settings())
    metadata = {**given.pop("Metadata", {}), MADE_OF: made_of}
    return {"ContentType": "application/octet-stream", **given, "Metadata": metadata}
