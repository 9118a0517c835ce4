"""A fine-tune is refused whose tokenizer is not its base's, as far as the lock and the fine-tune tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.errors import SourceError
from mlflow_safelock.forging.base_tokenizer import digest_of_tokenizer
from mlflow_safelock.gate.stored_tokenizer import find_tokenizer
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import ArtifactFile, LocalArtifacts, Span
from tests.forging.tokenizers import tokenizer
from tests.models import tiny_tokenizer
from tests.registries import base_lock, fine_tune, log_fine_tune, register_lock, state_of
from tests.registry.test_guard import download_uri
from tests.registry.test_promotion import hub, ledger_rows, log_adapter_alone, open_with_policy, stage
from tests.registry.test_standalone import folder_of

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

assert hub, "a fixture"

TOKENIZER = "components/tokenizer/tokenizer.json"


def knowing(base: Any) -> SafetyLock:
    """The base's lock, with what is known of a tokenizer."""
    lock, known = base_lock(), digest_of_tokenizer(base)
    assert known is not None
    return replace(lock, metadata=lock.metadata.model_copy(update={"tokenizer": known}))


def with_tokens_of_its_own() -> dict[str, Any]:
    components = fine_tune()
    components["tokenizer"].add_tokens(["<|own|>", "photosynthesis"])
    return components


def test_a_fine_tune_with_tokens_of_its_own_passes_and_that_is_on_record(
    client: MlflowClient, tmp_path: Path
) -> None:
    register_lock(knowing(tiny_tokenizer()))
    stage(client, log_fine_tune("bot", with_tokens_of_its_own()))
    assert ledger_rows(tmp_path)[-1]["tokenizer"] == "same"


def test_one_with_another_vocabulary_is_refused_and_the_registry_is_as_it_was(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_lock(knowing(tokenizer("byte_level", None)))
    log_fine_tune("bot")
    before = state_of(client, "bot", 1)
    with pytest.raises(MlflowException, match=r"other_tokenizer.*tokenizer: ignore") as info:
        stage(client, 1)
    assert info.value.error_code == "RESOURCE_CONFLICT"
    assert state_of(client, "bot", 1) == before
    assert ledger_rows(tmp_path)[-1]["reason"] == "other_tokenizer"
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{tokenizer: ignore}]\n")
    stage(client, 1)
    assert ledger_rows(tmp_path)[-1]["tokenizer"] == "ignored"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
def test_an_adapter_alone_is_logged_without_one(client: MlflowClient, hub: str, tmp_path: Path) -> None:
    register_lock(knowing(tokenizer("byte_level", None)))
    version, _ = log_adapter_alone(["q_proj"])
    stage(client, version)
    assert ledger_rows(tmp_path)[-1]["tokenizer"] == "unknown"


@pytest.mark.parametrize("unknown", ["of the lock", "of the fine-tune", "of a kind"])
def test_what_is_not_known_passes_unless_the_policy_requires_it(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unknown: str
) -> None:
    register_lock(base_lock() if unknown == "of the lock" else knowing(tiny_tokenizer()))
    log_fine_tune("bot")
    file = folder_of(download_uri(client, 1)) / TOKENIZER
    if unknown == "of the fine-tune":
        file.unlink()
    elif unknown == "of a kind":
        file.write_text('{"model": {"type": "Other"}}')
    with monkeypatch.context() as while_required:
        policy = "version: 1\ngates: [{tokenizer: require}]\n"
        client = open_with_policy(tmp_path, while_required, policy)
        with pytest.raises(MlflowException, match=r"tokenizer_unknown.*safelock lock enroll") as info:
            stage(client, 1)
        assert info.value.error_code == "PERMISSION_DENIED"
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{tokenizer: check}]\n")
    stage(client, 1)
    assert ledger_rows(tmp_path)[-1]["tokenizer"] == "unknown"


def test_a_damaged_one_is_refused_with_its_name(client: MlflowClient) -> None:
    register_lock(knowing(tiny_tokenizer()))
    log_fine_tune("bot")
    file = folder_of(download_uri(client, 1)) / TOKENIZER
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MlflowException, match=r"unreadable.*tokenizer\.json"):
        stage(client, 1)


@pytest.mark.parametrize(
    ("gate", "floor", "served"),
    [("check", "ignore", False), ("require", "check", True), ("check", "check", True)],
)
def test_a_tag_that_comes_afterwards_asks_for_what_its_gate_does(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: str, floor: str, served: bool
) -> None:
    policy = f"version: 1\ngates: [{{tags: {{a: b}}, tokenizer: {gate}}}, {{tokenizer: {floor}}}]\n"
    client = open_with_policy(tmp_path, monkeypatch, policy)
    register_lock(knowing(tiny_tokenizer()))
    log_fine_tune("bot")
    stage(client, 1)
    client.set_model_version_tag("bot", "1", "a", "b")
    if not served:
        with pytest.raises(MlflowException, match="not_locked"):
            download_uri(client, 1)
        stage(client, 1)
    assert download_uri(client, 1)


@dataclass
class Counted:
    """A local folder that counts how often a file is read whole."""

    folder: LocalArtifacts
    reads: Counter[str] = field(default_factory=Counter)
    parallel_files: int = 1

    @property
    def location(self) -> str:
        return self.folder.location

    def files(self) -> tuple[ArtifactFile, ...]:
        return self.folder.files()

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        self.reads[path] += 1
        return self.folder.read(path, start, length)

    def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
        return self.folder.read_many(path, spans)


def test_it_is_read_once_as_long_as_it_is_the_same(tmp_path: Path) -> None:
    base, other = tiny_tokenizer(), tokenizer("byte_level", None)
    known, others = digest_of_tokenizer(base), digest_of_tokenizer(other)
    assert known is not None
    assert others is not None
    base.save_pretrained((tmp_path / TOKENIZER).parent)
    reader = Counted(LocalArtifacts(tmp_path))

    def extends(digest: Any) -> bool | None:
        found = find_tokenizer(reader, "model")
        assert found is not None
        return found.extends(digest)

    assert [extends(known), extends(known), extends(others)] == [True, True, False]
    assert reader.reads[TOKENIZER] == 2, "once for each base"
    other.save_pretrained((tmp_path / TOKENIZER).parent)
    assert [extends(known), extends(others)] == [False, True]
    (tmp_path / TOKENIZER).write_text("nonsense")
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        extends(known)
