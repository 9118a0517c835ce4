"""A folder behind an HTTP server, such as MLflow's own artifact proxy, read in parts where the server can."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus

import requests
from mlflow.exceptions import MlflowException
from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

from mlflow_safelock.errors import SourceError
from mlflow_safelock.provenance import Span
from mlflow_safelock.registry.ranges import PARALLEL_FILES, PARALLEL_REQUESTS, read_spans
from mlflow_safelock.registry.remote import RemoteArtifacts, source_error

PROXIED_SCHEMES = frozenset({"http", "https", "mlflow-artifacts"})


@dataclass(frozen=True)
class ProxiedArtifacts(RemoteArtifacts):
    """A folder behind an HTTP server: ranged requests where it honours them, otherwise whole files.

    MLflow's server honours them for a local artifact destination. For any other it fetches the whole file
    itself, and sends it whole.
    """

    @property
    def parallel_files(self) -> int:
        """As many as keep the line busy."""
        return PARALLEL_FILES

    @property
    def reads_parts(self) -> bool:
        """Yes, as far as is known before a file is asked for."""
        return True

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of one file from ``start``, ``length`` of them or up to its end."""
        if length is None or path in self._whole:
            return super().read(path, start, length)
        if length == 0:
            return b""
        data = self._ranged(path, start, length)
        if data is None:
            self._whole.add(path)
            return super().read(path, start, length)
        return data

    def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of several parts of one file: neighbours by one request, several requests at once."""
        if spans and path not in self._whole:
            self.read(path, *spans[0])  # tells whether the server sends parts, before many are asked for
        if path in self._whole:
            return super().read_many(path, spans)
        return read_spans(lambda start, length: self.read(path, start, length), spans, lambda: self._executor)

    def _ranged(self, path: str, start: int, length: int) -> bytes | None:
        """The bytes, or ``None`` where the server sends the whole file."""
        name = f"The file {path!r} at {self.uri}"
        try:
            with http_request(
                self._repository._host_creds,
                posixpath.join("/", path),
                "GET",
                extra_headers={"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"},
                stream=True,
            ) as answer:
                if answer.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise SourceError(f"{name} ends before byte {start}: it is cut off.")
                augmented_raise_for_status(answer)
                if answer.status_code != HTTPStatus.PARTIAL_CONTENT:
                    return None
                self._check_unchanged(name, path, answer)
                data: bytes = answer.content
        except (MlflowException, requests.RequestException) as error:
            raise source_error(
                f"{name} cannot be read",
                error,
                "Look whether the server answers and this process may read there; do it again.",
            ) from error
        if len(data) != length:
            raise SourceError(
                f"{name} gave {len(data)} bytes in place of the {length} from byte {start}.",
                next_step="Look whether it is cut off, and do it again.",
            )
        return data

    def _check_unchanged(self, name: str, path: str, answer: requests.Response) -> None:
        """Compare what the server says of the file with what it said first."""
        said = (
            answer.headers.get("ETag"),
            answer.headers.get("Last-Modified"),
            answer.headers.get("Content-Range", "").rpartition("/")[2],
        )
        if self._said.setdefault(path, said) != said:
            raise SourceError(
                f"{name} was changed while it was read.",
                next_step="Let nobody write there, and do it again.",
            )

    @cached_property
    def _whole(self) -> set[str]:
        return set()

    @cached_property
    def _said(self) -> dict[str, tuple[str | None, str | None, str]]:
        return {}

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="safelock-http")
