"""Models on S3: little of them is read, what changes or fails is a typed error, copies never pass here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import mlflow
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.numpy import save_file

from mlflow_safelock.apply.checkpoint.progress import silent
from mlflow_safelock.errors import SourceError, UnreachableError, VerificationError
from mlflow_safelock.flavors.overlay import read_overlay
from mlflow_safelock.flavors.standalone import Patches, WeightsFile
from mlflow_safelock.provenance import (
    LocalArtifacts,
    SourceFingerprint,
    check_fingerprint,
    read_header,
    take_fingerprint,
)
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from mlflow_safelock.registry.s3 import S3Artifacts, s3_client
from mlflow_safelock.registry.s3_copies import S3Copies, parts_of
from mlflow_safelock.registry.s3_publication import S3Publication
from tests.registries import REQUIREMENTS, base_lock, biases_of, fine_tune, register_lock
from tests.registry.s3_server import S3Server, s3_server

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

WEIGHTS = "model/model.safetensors"
PREFIX = "models/bot"
URI = f"s3://models/{PREFIX}"


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
        "MLFLOW_S3_ENDPOINT_URL": running.url,
    }.items():
        monkeypatch.setenv(name, value)
    store(running).clear()
    running.faults.clear()
    running.forget()
    yield running
    running.faults.clear()


class Store:
    """What somebody else does in the bucket."""

    def __init__(self, server: S3Server) -> None:
        self.client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1", **CREDENTIALS)

    def clear(self) -> None:
        for bucket in self.client.list_buckets()["Buckets"]:
            for entry in self.client.list_objects_v2(Bucket=bucket["Name"]).get("Contents", []):
                self.client.delete_object(Bucket=bucket["Name"], Key=entry["Key"])
        self.client.create_bucket(Bucket="models")
        self.client.create_bucket(Bucket="locked")

    def put(self, path: str, data: bytes, prefix: str = PREFIX) -> None:
        self.client.put_object(Bucket="models", Key=f"{prefix}/{path}", Body=data)

    def put_folder(self, folder: Path, prefix: str = PREFIX) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(path.relative_to(folder).as_posix(), path.read_bytes(), prefix)

    def keys(self, bucket: str) -> set[str]:
        return {entry["Key"] for entry in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])}

    def uploads(self, bucket: str) -> list[Any]:
        return list(self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", []))


CREDENTIALS = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}


def store(server: S3Server) -> Store:
    return Store(server)


@pytest.fixture
def source(tmp_path: Path, server: S3Server) -> Path:
    """A model folder, on S3 at ``URI`` and locally."""
    folder = tmp_path / "source"
    (folder / "model").mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors: {}\n")
    (folder / "model/config.json").write_text('{"model_type": "llama"}')
    (folder / "model/empty.txt").write_bytes(b"")
    generator = np.random.default_rng(0)
    tensors = {f"layer.{i}": generator.normal(size=(256, 1024)).astype(np.float32) for i in range(6)}
    save_file(tensors, folder / WEIGHTS)
    store(server).put_folder(folder)
    server.forget()
    return folder


def test_a_folder_reads_like_the_local_one(source: Path) -> None:
    remote, local = S3Artifacts(URI), LocalArtifacts(source)
    assert [(file.path, file.size) for file in remote.files()] == [
        (file.path, file.size) for file in local.files()
    ]
    spans = [(5, 3), (0, 0), (100_000, 70_000), (100_010, 5), (3_000_000, 4096), (2_000_000, 4096)]
    assert remote.read_many(WEIGHTS, spans) == local.read_many(WEIGHTS, spans)
    for file in local.files():
        assert remote.read(file.path) == local.read(file.path)
    assert remote.read(WEIGHTS, 17) == local.read(WEIGHTS, 17)
    assert read_header(remote, WEIGHTS) == read_header(local, WEIGHTS)


def test_a_listing_has_many_pages_and_is_made_once(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "5")
    for number in range(8):
        store(server).put(f"{number:04}", b"x")
    store(server).client.put_object(Bucket="models", Key=f"{PREFIX}-safelock/other", Body=b"x")
    server.forget()
    reader = S3Artifacts(URI)
    assert len(reader.files()) == 8
    assert len(reader.files()) == 8
    assert [passed.method for passed in server.passed] == ["GET", "GET"], "two pages, once"


def test_neighbours_come_by_one_request(source: Path, server: S3Server) -> None:
    reader = S3Artifacts(URI)
    reader.files()
    server.forget()
    reader.read_many(WEIGHTS, [(number * 10_000, 100) for number in range(50)])
    assert [passed.range for passed in server.passed] == ["bytes=0-490099"]


def test_a_fingerprint_of_s3_is_one_of_the_download_too(source: Path, server: S3Server) -> None:
    fingerprint = take_fingerprint(S3Artifacts(URI))
    assert all(file.checksum and file.checksum.etag for file in fingerprint.files)
    assert server.read < 0.03 * (source / WEIGHTS).stat().st_size
    assert SourceFingerprint.model_validate_json(fingerprint.model_dump_json()) == fingerprint
    check_fingerprint(fingerprint, S3Artifacts(URI))
    check_fingerprint(fingerprint, LocalArtifacts(source))
    check_fingerprint(take_fingerprint(LocalArtifacts(source)), S3Artifacts(URI))


def test_a_chosen_byte_that_no_block_covers_changes_the_store_s_checksum(
    source: Path, server: S3Server
) -> None:
    fingerprint = take_fingerprint(S3Artifacts(URI))
    spans = next(file.spans for file in fingerprint.files if file.path == WEIGHTS)
    data = bytearray((source / WEIGHTS).read_bytes())
    missed = next(i for i in range(len(data) - 1, 0, -1) if not any(s <= i < s + n for s, n in spans))
    data[missed] ^= 1
    store(server).put(WEIGHTS, bytes(data))
    with pytest.raises(VerificationError, match=r"model\.safetensors.*another checksum"):
        check_fingerprint(fingerprint, S3Artifacts(URI))
    (source / WEIGHTS).write_bytes(data)
    check_fingerprint(fingerprint, LocalArtifacts(source))  # a local folder has no checksum to compare


def test_version_and_sha256_are_recorded_where_the_store_has_them(source: Path, server: S3Server) -> None:
    client = store(server).client
    client.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
    try:
        client.put_object(
            Bucket="models",
            Key=f"{PREFIX}/{WEIGHTS}",
            Body=(source / WEIGHTS).read_bytes(),
            ChecksumAlgorithm="SHA256",
        )
        checksum = S3Artifacts(URI).file(WEIGHTS).checksum
    finally:
        client.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Suspended"})
    assert checksum is not None
    assert checksum.version_id
    assert checksum.sha256


def test_a_file_that_changes_after_the_listing_is_an_error(source: Path, server: S3Server) -> None:
    reader = S3Artifacts(URI)
    reader.files()
    store(server).put("MLmodel", b"flavors: []\n")
    with pytest.raises(SourceError, match=r"'MLmodel'.*was changed after it was listed") as info:
        reader.read("MLmodel")
    assert "register a changed model" in info.value.next_step


def test_a_file_that_goes_after_the_listing_is_an_error(source: Path, server: S3Server) -> None:
    reader = S3Artifacts(URI)
    reader.files()
    store(server).client.delete_object(Bucket="models", Key=f"{PREFIX}/MLmodel")
    with pytest.raises(SourceError, match=r"'MLmodel' at s3://models/models/bot is not there"):
        reader.read("MLmodel")


def test_what_is_not_there_is_an_error(source: Path) -> None:
    with pytest.raises(SourceError, match="There are no files at s3://models/nothing"):
        S3Artifacts("s3://models/nothing").files()
    with pytest.raises(SourceError, match=r"s3://nobucket/x is not there.*NoSuchBucket"):
        S3Artifacts("s3://nobucket/x").files()
    with pytest.raises(SourceError, match="There is no file 'other'"):
        S3Artifacts(URI).read("other")
    with pytest.raises(SourceError, match=r"ends at byte 12, before 13"):
        S3Artifacts(URI).read("MLmodel", 0, 13)


@pytest.mark.parametrize("containing", ["list-type", "MLmodel"])
def test_access_denied_is_an_error_that_names_the_rights(
    source: Path, server: S3Server, containing: str
) -> None:
    server.fail("denied", containing=containing)
    with pytest.raises(SourceError, match="may not be accessed") as info:
        S3Artifacts(URI).read("MLmodel")
    assert not isinstance(info.value, UnreachableError)
    assert "s3:GetObject" in info.value.next_step


def test_a_busy_store_is_asked_again_and_then_given_up(source: Path, server: S3Server) -> None:
    server.fail("busy", times=1, containing="MLmodel")
    assert S3Artifacts(URI).read("MLmodel") == b"flavors: {}\n"
    server.forget()
    server.fail("busy", containing="MLmodel")
    with pytest.raises(UnreachableError, match=r"overloaded.*SlowDown") as info:
        S3Artifacts(URI).read("MLmodel")
    assert "AWS_MAX_ATTEMPTS" in info.value.next_step
    assert len([passed for passed in server.passed if "MLmodel" in passed.target]) == 2


def test_a_store_that_does_not_answer_is_an_error(source: Path, server: S3Server) -> None:
    server.fail("silent", containing="MLmodel")
    with pytest.raises(SourceError, match=r"does not answer.*[Tt]imeout"):
        S3Artifacts(URI, s3_client(read_seconds=0.3)).read("MLmodel")


def test_nobody_at_the_endpoint_is_an_error(monkeypatch: pytest.MonkeyPatch, server: S3Server) -> None:
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match=r"cannot be reached.*127\.0\.0\.1:1"):
        S3Artifacts(URI).files()


def test_an_answer_that_breaks_off_is_asked_for_again(source: Path, server: S3Server) -> None:
    server.fail("short", times=2, containing="MLmodel")
    assert S3Artifacts(URI).read("MLmodel") == b"flavors: {}\n"
    server.fail("short", containing="MLmodel")
    with pytest.raises(SourceError, match="'MLmodel'"):
        S3Artifacts(URI).read("MLmodel")


def test_a_failure_of_one_of_many_parts_is_an_error(source: Path, server: S3Server) -> None:
    reader = S3Artifacts(URI)
    reader.files()
    server.fail("denied", times=1, containing="safetensors")
    with pytest.raises(SourceError, match="may not be accessed"):
        reader.read_many(WEIGHTS, [(number << 20, 10) for number in range(5)])


LOCKED = "s3://locked/bot"


def publish() -> S3Publication:
    return S3Publication(S3Artifacts(LOCKED))


def copies(**sizes: int) -> S3Copies:
    return S3Copies(S3Artifacts(URI), S3Artifacts(LOCKED), **sizes)


def file_of_weights(path: str, origin: str = WEIGHTS, patches: Patches = ()) -> WeightsFile:
    return WeightsFile(path, origin, patches, "copy")


def test_the_store_copies_and_nothing_passes_here(source: Path, server: S3Server) -> None:
    made = copies()
    made.source.files()
    server.forget()
    told: list[tuple[str, int, int]] = []
    wanted = [file_of_weights("model/a"), file_of_weights("other/empty", "model/empty.txt")]
    made.make(wanted, lambda *how_far: told.append(how_far))
    size = (source / WEIGHTS).stat().st_size
    assert told[0] == ("Copying the weights", 0, size)
    assert told[-1] == ("Copying the weights", size, size)
    assert server.read < 10_000
    copy = S3Artifacts(LOCKED)
    assert [file.path for file in copy.files()] == ["model/a", "other/empty"]
    assert copy.read("model/a") == (source / WEIGHTS).read_bytes()


def test_a_large_file_is_copied_in_parts(source: Path, server: S3Server) -> None:
    data = np.random.default_rng(1).bytes(13 << 20)
    store(server).put("large", data)
    made = copies(whole_copy_bytes=5 << 20, part_bytes=5 << 20)
    made.source.files()
    server.forget()
    made.make([file_of_weights(WEIGHTS, "large")], silent)
    parts = [passed for passed in server.passed if "partNumber" in passed.target]
    assert len(parts) == 2
    assert sum(passed.sent for passed in parts) == 0
    assert S3Artifacts(LOCKED).read(WEIGHTS) == data


def test_a_copy_that_is_there_is_not_made_again(source: Path, server: S3Server) -> None:
    copies().make([file_of_weights("a"), file_of_weights("b", patches=((9_000, b"x"),))], silent)
    server.forget()
    told: list[int] = []
    copies().make(
        [file_of_weights("a"), file_of_weights("b", patches=((9_000, b"x"),))],
        lambda _what, done, _total: told.append(done),
    )
    assert server.copies == []
    assert max(told) == 2 * (source / WEIGHTS).stat().st_size
    copies().make([file_of_weights("b", patches=((9_000, b"y"),))], silent)
    assert S3Artifacts(LOCKED).read("b", 9_000, 1) == b"y", "with other biases it is another file"
    store(server).put(WEIGHTS, (source / WEIGHTS).read_bytes()[:-1] + b"z")
    copies().make([file_of_weights("a")], silent)
    assert S3Artifacts(LOCKED).read("a")[-1:] == b"z", "a source that changed is copied anew"


def test_a_file_that_was_not_made_by_a_copy_is_written_over(source: Path, server: S3Server) -> None:
    size = (source / WEIGHTS).stat().st_size
    store(server).client.put_object(Bucket="locked", Key="bot/a", Body=bytes(size))
    copies().make([file_of_weights("a")], silent)
    assert S3Artifacts(LOCKED).read("a") == (source / WEIGHTS).read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 100 << 20),
    places=st.lists(st.floats(0, 0.999), max_size=6, unique=True),
    part=st.sampled_from([5 << 20, 16 << 20, 1 << 30]),
)
def test_parts_cover_a_file_and_none_is_too_small_but_the_last(
    size: int, places: list[float], part: int
) -> None:
    begins = sorted({int(place * size) // 4096 * 4096 for place in places})
    patches = tuple((begin, bytes(min(4096, size - begin))) for begin in begins)
    parts = parts_of(size, patches, part)
    assert [one.start for one in parts] == [0, *(one.end for one in parts[:-1])]
    assert parts[-1].end == size
    assert all(one.end - one.start >= 5 << 20 for one in parts[:-1])
    assert all(one.end > one.start for one in parts)
    for begin, new in patches:
        for one in parts:
            if one.start < begin + len(new) and begin < one.end:
                assert one.uploaded
    assert sum(one.end - one.start for one in parts if one.uploaded) <= len(patches) * (11 << 20)


def test_biases_that_differ_are_uploaded_with_as_little_around_them_as_s3_takes(server: S3Server) -> None:
    data = np.random.default_rng(1).bytes(40 << 20)
    store(server).put(WEIGHTS, data)
    patches = ((12 << 20, b"some"), ((12 << 20) + 6, b"bias"), (30 << 20, b"other"))
    made = copies()
    made.source.files()
    server.forget()
    made.make([file_of_weights(WEIGHTS, patches=patches)], silent)
    assert sum(passed.sent for passed in server.passed) < 11 << 20
    assert server.read < 11 << 20
    expected = bytearray(data)
    for begin, new in patches:
        expected[begin : begin + len(new)] = new
    assert S3Artifacts(LOCKED).read(WEIGHTS) == expected


def test_an_error_leaves_no_key_behind(server: S3Server) -> None:
    with pytest.raises(RuntimeError, match="disk full"), publish() as publication:  # noqa: PT012
        publication.put("MLmodel", b"x")
        publication.put("MLmodel.source", b"y")
        publication.put("model/config.json", b"{}")
        raise RuntimeError("disk full")
    assert store(server).keys("locked") == set()


def test_an_mlmodel_file_that_cannot_be_written_leaves_no_key_behind(server: S3Server) -> None:
    server.fail("denied", method="PUT", containing="MLmodel")
    with pytest.raises(SourceError, match="may not be accessed"), publish() as publication:  # noqa: PT012
        publication.put("MLmodel", b"x")
        publication.put("MLmodel.source", b"y")
        publication.put("model/config.json", b"{}")
    assert store(server).keys("locked") == set()


def test_a_copy_in_parts_that_fails_leaves_no_key_and_no_upload_behind(
    source: Path, server: S3Server
) -> None:
    store(server).put("large", bytes(13 << 20))
    server.fail("denied", method="PUT", containing="partNumber=2")
    with pytest.raises(SourceError, match="may not be accessed"):
        copies(whole_copy_bytes=5 << 20, part_bytes=5 << 20).make([file_of_weights(WEIGHTS, "large")], silent)
    assert store(server).keys("locked") == set()
    assert store(server).uploads("locked") == []


@pytest.mark.parametrize("kind", ["busy", "denied"])
def test_copies_that_were_made_before_a_failure_are_kept_and_not_made_again(
    source: Path, server: S3Server, kind: str
) -> None:
    wanted = [file_of_weights(f"model/{number}") for number in range(7)]
    server.fail(kind, method="PUT", after=3)
    with pytest.raises(SourceError, match=r"being copied to s3://locked/bot") as info:
        copies().make(wanted, silent)
    assert "Doing it again goes on" in info.value.next_step
    assert len(server.copies) == len(store(server).keys("locked")) == 3
    server.faults.clear()
    server.forget()
    copies().make(wanted, silent)
    assert len(server.copies) == 4
    assert len(store(server).keys("locked")) == 7


def test_a_folder_that_somebody_else_completed_is_not_deleted(server: S3Server) -> None:
    with publish() as other:
        other.put("MLmodel", b"x")
        other.put("lock", b"y")
    with pytest.raises(RuntimeError), publish() as publication:  # noqa: PT012
        publication.put("lock", b"y")
        raise RuntimeError
    assert store(server).keys("locked") == {"bot/MLmodel", "bot/lock"}


def test_a_source_that_changes_is_not_copied(source: Path, server: S3Server) -> None:
    made = copies()
    made.source.files()
    store(server).put(WEIGHTS, bytes(100))
    with pytest.raises(SourceError, match=r"changed after it was listed"):
        made.make([file_of_weights(WEIGHTS)], silent)
    assert store(server).keys("locked") == set()


@pytest.fixture
def logged(
    client: MlflowClient, tmp_path: Path, server: S3Server
) -> Callable[[str, int], tuple[str, int, int]]:
    """Log a fine-tune, on S3, of so many layers' worth of MLP; its registered version and its size."""
    experiment = mlflow.create_experiment("on-s3", artifact_location="s3://models/mlflow")
    mlflow.set_experiment(experiment_id=experiment)

    def log(name: str, width: int) -> tuple[str, int, int]:
        with mlflow.start_run():
            info = mlflow.transformers.log_model(
                fine_tune(intermediate_size=width),
                name="model",
                task="text-generation",
                registered_model_name=name,
                pip_requirements=REQUIREMENTS,
            )
        sizes = [file.size for file in S3Artifacts(location(client, name)).files()]
        return name, int(info.registered_model_version), max(sizes)

    return log


def location(client: MlflowClient, name: str) -> str:
    return str(client.get_model_version_download_uri(name, "1"))


def test_a_promotion_of_a_model_on_s3_reads_little_whatever_its_size(
    client: MlflowClient, logged: Callable[[str, int], tuple[str, int, int]], server: S3Server
) -> None:
    register_lock(base_lock())
    figures = []
    for name, width in (("small", 2_000), ("bot", 70_000)):
        _, version, size = logged(name, width)
        source = location(client, name)
        assert source.startswith("s3://models/mlflow/")
        server.forget()
        client.transition_model_version_stage(name, str(version), "Staging")
        figures.append((size, server.read, len(server.passed)))
        overlay = location(client, name)
        assert overlay.startswith(f"{source}-safelock/")
        fingerprint = read_overlay(RegistryArtifacts().reader(overlay)).receipt.predicate.source.fingerprint
        assert all(file.checksum for file in fingerprint.files)
    (small, read_small, requests_small), (large, read_large, requests_large) = figures
    assert small > 1 << 20
    assert large > 40e6
    assert read_large < 2e6
    # Blocks are drawn at random, and those that are close to each other are read as one with what is between.
    assert read_large < 1.2 * read_small + 200_000
    assert requests_large <= requests_small + 6
    loaded = mlflow.pyfunc.load_model("models:/bot/Staging")
    assert biases_of(loaded._model_impl.pipeline.model)


def test_a_store_that_fails_refuses_the_promotion_and_leaves_nothing_behind(
    client: MlflowClient, logged: Callable[[str, int], tuple[str, int, int]], server: S3Server
) -> None:
    register_lock(base_lock())
    logged("bot", 64)
    before, keys = location(client, "bot"), store(server).keys("models")
    server.fail("denied", method="PUT", containing="receipt.json")
    with pytest.raises(MlflowException, match=r"unreadable.*may not be accessed"):
        client.transition_model_version_stage("bot", "1", "Staging")
    assert location(client, "bot") == before
    assert client.get_model_version("bot", "1").current_stage == "None"
    assert store(server).keys("models") == keys
    server.faults.clear()
    client.transition_model_version_stage("bot", "1", "Staging")
    assert client.get_model_version("bot", "1").current_stage == "Staging"


class TestLockedFolders:
    """What a sweep lists and deletes."""

    OVERLAY, STANDALONE = 32 * "a", f"standalone-{32 * 'b'}"

    @pytest.fixture
    def beside(self, server: S3Server) -> set[str]:
        """Folders of locked models beside ``URI``, and what only looks like some; their keys."""
        put = store(server).put
        for path in ("receipt.json", "MLmodel"):
            put(path, b"12345", f"{PREFIX}-safelock/{self.OVERLAY}")
        put("model/model.safetensors", b"123", f"{PREFIX}-safelock/{self.STANDALONE}")
        for prefix in (PREFIX, f"{PREFIX}-safelock", f"{PREFIX}-safelock-old", f"{PREFIX}-safelock/other"):
            put("MLmodel", b"kept", prefix)
        put("MLmodel", b"kept", f"{PREFIX}-safelock/{self.OVERLAY}0")
        return store(server).keys("models")

    def test_are_listed_with_their_bytes_and_nothing_else_is(self, beside: set[str]) -> None:
        overlay, standalone = RegistryArtifacts().locked_folders(f"{URI}/")
        assert overlay.location == f"{URI}-safelock/{self.OVERLAY}"
        assert (overlay.size, overlay.files, overlay.is_complete) == (10, 2, True)
        assert (standalone.size, standalone.files, standalone.is_complete) == (3, 1, False)
        assert RegistryArtifacts().locked_folders("s3://models/nothing") == ()

    def test_one_is_deleted_and_its_neighbours_stay(self, server: S3Server, beside: set[str]) -> None:
        RegistryArtifacts().delete_locked_folder(f"{URI}-safelock/{self.OVERLAY}")
        gone = beside - store(server).keys("models")
        assert gone == {f"{PREFIX}-safelock/{self.OVERLAY}/{name}" for name in ("MLmodel", "receipt.json")}

    @pytest.mark.parametrize(
        "place",
        [
            *(URI, f"{URI}-safelock", f"{URI}-safelock/other", f"{URI}-safelock-old"),
            *(f"{URI}/{32 * 'a'}", f"{URI}-safelock/../{32 * 'a'}", f"{URI}-safelock/{32 * 'a'}/.."),
            *("/", "", "/etc-safelock/passwd", f"/nowhere/{32 * 'a'}"),
        ],
    )
    def test_nothing_else_is_deleted_whatever_is_asked_for(
        self, server: S3Server, beside: set[str], place: str
    ) -> None:
        with pytest.raises(SourceError, match="is no folder of a locked model"):
            RegistryArtifacts().delete_locked_folder(place)
        assert store(server).keys("models") == beside

    def test_a_store_that_refuses_is_an_error_and_no_empty_list(
        self, server: S3Server, beside: set[str]
    ) -> None:
        server.fail("denied", method="POST")
        with pytest.raises(SourceError, match="may not be accessed"):
            RegistryArtifacts().delete_locked_folder(f"{URI}-safelock/{self.OVERLAY}")
        server.fail("denied", method="GET")
        with pytest.raises(SourceError, match="may not be accessed"):
            RegistryArtifacts().locked_folders(URI)
        server.faults.clear()
        assert store(server).keys("models") == beside
