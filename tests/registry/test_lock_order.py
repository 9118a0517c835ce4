"""Locks of a base only move forward: whatever they are called, and whoever registered them."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from mlflow_safelock.audit import audit
from mlflow_safelock.errors import PromotionRefused, UnreachableError
from mlflow_safelock.flavors import meta_safetylock
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.gate.explanation import explain
from mlflow_safelock.gate.leases import Work
from mlflow_safelock.gate.lock_records import FoundLock, LockRecords
from mlflow_safelock.gate.renaming import Renaming
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import Actor
from mlflow_safelock.registry import sql_ledger
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from tests.registries import BASE, base_lock, log_fine_tune, register_lock, state_of
from tests.registry.test_guard import (
    download_uri,
    edit_row,
    loaded_biases,
    locked_version,
    log_prices,
    stock_registry,
    store_of,
    to_staging,
)
from tests.registry.test_promotion import ledger_rows, open_with_policy, stage

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

NAME = lock_model_name(BASE)


def digests_on_record(client: MlflowClient) -> list[str]:
    """The digests of the base's locks in the order of their coming."""
    known = store_of(client)._gate.registry.locks_of("default", BASE)
    return [entry.lock.digest for entry in known]


def digests(*seeds: int) -> list[str]:
    return [base_lock(seed=seed).digest for seed in seeds]


def test_a_deleted_lock_does_not_bring_the_older_one_back(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock(seed=0))
    newest = register_lock(base_lock(seed=1))
    client.delete_model_version(lock_model_name(BASE), str(newest))
    with pytest.raises(MlflowException, match=r"lock_superseded.*safelock lock revoke models:/.*/2"):
        stage(client, version)
    register_lock(base_lock(seed=1))
    stage(client, version)
    with sqlite3.connect(tmp_path / "registry.db") as connection:
        rows = connection.execute("SELECT version FROM safelock_ledger WHERE event = 'registered'")
        assert [version for (version,) in rows] == [1, 2, 3], "each is on record by each of its numbers"
    assert digests_on_record(client) == digests(0, 1), "and once among those of its base"


def test_an_older_lock_is_not_registered_anew(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    for seed in (0, 1):
        register_lock(base_lock(seed=seed))
    with pytest.raises(MlflowException, match=r"register a lock.*lock_superseded") as info:
        register_lock(base_lock(seed=0))
    assert info.value.error_code == "PERMISSION_DENIED"
    assert [found.version for found in client.search_model_versions("name='safelock.org--tiny-base'")] == [
        2,
        1,
    ]
    with stock_registry(tmp_path):
        register_lock(base_lock(seed=0))
    with pytest.raises(MlflowException, match=r"lock_superseded.*version 3 was superseded by .* version 2"):
        stage(client, version)


def test_nor_does_it_come_back_with_a_model_that_was_deleted_and_made_anew(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    for seed in (0, 1):
        register_lock(base_lock(seed=seed))
    client.delete_registered_model(lock_model_name(BASE))
    with stock_registry(tmp_path):
        register_lock(base_lock(seed=0))
    with pytest.raises(MlflowException, match=r"lock_superseded.*version 1 was superseded by .* version 2"):
        stage(client, version)
    assert ledger_rows(tmp_path)[-1]["reason"] == "lock_superseded"


def test_a_copy_of_an_older_lock_is_none_that_is_newer(client: MlflowClient) -> None:
    log_fine_tune("bot")
    for seed in (0, 1):
        register_lock(base_lock(seed=seed))
    name = lock_model_name(BASE)
    with pytest.raises(MlflowException, match=r"register a lock.*lock_superseded"):
        client.copy_model_version(f"models:/{name}/1", name)
    assert client.copy_model_version(f"models:/{name}/2", name).version == 3
    stage(client, 1)


def test_a_lock_that_came_past_the_gate_is_older_than_one_that_comes_through_it_later(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    with stock_registry(tmp_path):
        register_lock(base_lock(seed=0))
    register_lock(base_lock(seed=1))
    known = store_of(client)._gate.registry.locks_of("default", BASE)
    assert [entry.lock.digest for entry in known] == [base_lock(seed=seed).digest for seed in (0, 1)]
    stage(client, version)
    assert ledger_rows(tmp_path)[-1]["lock"]["version"] == 2


@pytest.mark.parametrize("applied", [True, False])
def test_a_lock_that_came_past_the_gate_does_not_follow_a_newer_one_that_is_gone(
    client: MlflowClient, tmp_path: Path, applied: bool
) -> None:
    version, name = log_fine_tune("bot"), lock_model_name(BASE)
    with stock_registry(tmp_path):
        register_lock(base_lock(seed=0))
        register_lock(base_lock(seed=1))
    if applied:
        stage(client, version)
    with stock_registry(tmp_path):
        client.delete_model_version(name, "2")
    with pytest.raises(MlflowException, match=r"lock_superseded.*registered past the gate"):
        stage(client, log_fine_tune("bot"))


def test_nor_does_it_follow_those_of_a_model_that_was_deleted_and_made_anew(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    for seed in (1, 2):
        register_lock(base_lock(seed=seed))
    client.delete_registered_model(lock_model_name(BASE))
    with stock_registry(tmp_path):
        register_lock(base_lock(seed=0))
    with pytest.raises(MlflowException, match=r"lock_superseded.*registered past the gate"):
        stage(client, version)
    register_lock(base_lock(seed=3))
    stage(client, version)
    assert ledger_rows(tmp_path)[-1]["lock"]["digest"] == base_lock(seed=3).digest


def test_a_newer_lock_that_is_no_good_is_revoked_though_it_be_deleted(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock(seed=0))
    newest = register_lock(base_lock(seed=1))
    client.delete_model_version(lock_model_name(BASE), str(newest))
    store_of(client).revoke_lock(lock_model_name(BASE), newest, "too strong")
    stage(client, version)
    register_lock(base_lock(seed=0))
    stage(client, version)
    assert ledger_rows(tmp_path)[-1]["lock"]["digest"] == base_lock(seed=0).digest


def test_a_lock_is_revoked_by_its_digest_where_another_has_its_number(client: MlflowClient) -> None:
    name, gone = lock_model_name(BASE), base_lock(seed=1)
    register_lock(gone)
    client.delete_registered_model(name)
    register_lock(base_lock(seed=2))
    with pytest.raises(PromotionRefused, match="was never sha256:0"):
        store_of(client).revoke_lock(name, 1, "by mistake", f"sha256:{'0' * 64}")
    assert store_of(client).revoke_lock(name, 1, "too strong", gone.digest).digest == gone.digest
    stage(client, log_fine_tune("bot"))


def test_a_revoked_lock_is_applied_no_more(client: MlflowClient, tmp_path: Path) -> None:
    locked_version(client)
    store_of(client).revoke_lock(lock_model_name(BASE), 1, "leaked")
    assert loaded_biases(), "what runs it goes on, unless the policy says otherwise"
    second = log_fine_tune("bot")
    with pytest.raises(MlflowException, match=r"lock_revoked.*leaked"):
        stage(client, second)
    register_lock(base_lock(seed=0))
    with pytest.raises(MlflowException, match="lock_revoked"):
        stage(client, second)
    with pytest.raises(PromotionRefused, match="revoked already"):
        store_of(client).revoke_lock(lock_model_name(BASE), 2, "again")
    register_lock(base_lock(seed=1))
    stage(client, second)
    assert ledger_rows(tmp_path)[1]["event"] == "revoked"


def test_a_policy_may_stop_what_runs_a_revoked_lock(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, _ = locked_version(client)
    store_of(client).revoke_lock(lock_model_name(BASE), 1, "leaked")
    strict = "version: 1\ngates:\n  - lock: {revoked: refuse}\n"
    client = open_with_policy(tmp_path, monkeypatch, strict)
    with pytest.raises(MlflowException, match=r"lock_revoked.*leaked"):
        download_uri(client, version)


def test_what_is_no_lock_is_not_revoked(client: MlflowClient) -> None:
    version = log_fine_tune("bot")
    with pytest.raises(PromotionRefused, match="is no lock"):
        store_of(client).revoke_lock("bot", version, "by mistake")


@pytest.mark.parametrize("created", ["2020-01-31T12:00:00+00:00", "2999-01-31T12:00:00+00:00", None])
def test_a_policy_may_want_young_locks(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, created: str | None
) -> None:
    policy = "version: 1\ngates:\n  - lock: {max_age_days: 90}\n"
    client = open_with_policy(tmp_path, monkeypatch, policy)
    version = log_fine_tune("bot")
    lock = base_lock()
    dated = SafetyLock(lock.heads, lock.metadata.model_copy(update={"created": created}))
    register_lock(dated)
    with pytest.raises(MlflowException, match=r"lock_expired.*90 days"):
        stage(client, version)


def test_one_that_came_past_the_gate_below_one_on_record_is_the_older_one(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    with stock_registry(tmp_path):
        for seed in (0, 1):
            register_lock(base_lock(seed=seed))
    stage(client, version)
    assert digests_on_record(client) == digests(1), "what was applied alone"
    with pytest.raises(MlflowException, match=r"lock_superseded.*superseded by .* version 2"):
        client.copy_model_version(f"models:/{NAME}/1", NAME)
    assert digests_on_record(client) == digests(0, 1)
    register_lock(base_lock(seed=1))  # as signing it does
    stage(client, log_fine_tune("bot"))
    assert ledger_rows(tmp_path)[-1]["lock"]["digest"] == base_lock(seed=1).digest


def test_nor_is_one_newer_that_came_under_another_name(client: MlflowClient, tmp_path: Path) -> None:
    version = log_fine_tune("bot")
    with stock_registry(tmp_path):
        for seed in (0, 1):
            register_lock(base_lock(seed=seed))
        MlflowClient().rename_registered_model(NAME, "my-locks")
    client.rename_registered_model("my-locks", NAME)
    stage(client, version)
    with pytest.raises(MlflowException, match="lock_superseded"):
        client.copy_model_version(f"models:/{NAME}/1", NAME)


def test_one_whose_number_another_had_is_on_record_before_those_that_come_later(
    client: MlflowClient, tmp_path: Path
) -> None:
    register_lock(base_lock(seed=0))
    client.delete_registered_model(NAME)
    with stock_registry(tmp_path):
        register_lock(base_lock(seed=1))
    register_lock(base_lock(seed=2))
    assert digests_on_record(client) == digests(0, 1, 2)
    with pytest.raises(MlflowException, match="lock_superseded"):
        register_lock(base_lock(seed=1))


def test_two_that_are_registered_at_once_are_on_record_as_they_are_numbered(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Did the second not wait, it would be looked at before the first is made, and be on record before it."""
    register_lock(base_lock(seed=0))
    store, looked_at = type(store_of(client)), count(1)
    check, put = LockRecords.check_new, store._put_on_record
    second_is_looked_at, third_is_on_record = threading.Event(), threading.Event()

    def checked(*arguments: Any) -> FoundLock:
        lock = check(*arguments)
        if next(looked_at) == 1:
            second_is_looked_at.wait(4.0)
        else:
            second_is_looked_at.set()
        return lock

    def put_slowly(self: Any, lock: FoundLock, created: ModelVersion) -> None:
        if int(created.version) == 2:
            third_is_on_record.wait(1.0)
        put(self, lock, created)
        if int(created.version) == 3:
            third_is_on_record.set()

    monkeypatch.setattr(LockRecords, "check_new", checked)
    monkeypatch.setattr(store, "_put_on_record", put_slowly)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(meta_safetylock.register, [base_lock(seed=1), base_lock(seed=2)]))
    known = store_of(client)._gate.registry.locks_of("default", BASE)
    assert [entry.version for entry in known] == [1, 2, 3]
    stage(client, log_fine_tune("bot"))


def test_the_floor_is_held_against_the_number_that_a_lock_had_first(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, _ = locked_version(client)
    client.copy_model_version(f"models:/{NAME}/1", NAME)
    stage(client, log_fine_tune("bot"))
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{lock: {min_version: 2}}]\n")
    with pytest.raises(MlflowException, match=r"lock_too_old.*version 2, which was .* version 1 first"):
        stage(client, version)
    told = [fault for row in audit(f"sqlite:///{tmp_path}/registry.db") for fault in row.lock_faults]
    assert any("registered as version 1 first" in fault for fault in told), told
    register_lock(base_lock(seed=1))
    stage(client, version)


def test_nothing_but_a_lock_of_its_base_is_registered_under_a_locks_name(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock(seed=0))
    log_prices()
    with pytest.raises(MlflowException, match=r"no_lock.*for locks alone.*does not begin with 'safelock\.'"):
        client.copy_model_version("models:/prices/1", NAME)
    client.create_registered_model("safelock.other")
    with pytest.raises(MlflowException, match=rf"no_lock.*not for those.*{NAME}"):
        client.copy_model_version(f"models:/{NAME}/1", "safelock.other")
    stage(client, version)
    with stock_registry(tmp_path):
        MlflowClient().copy_model_version("models:/prices/1", NAME)
    with pytest.raises(
        MlflowException, match=rf"damaged_lock.*models:/{NAME}/2, is none.*delete that version"
    ):
        stage(client, log_fine_tune("bot"))
    client.delete_model_version(NAME, "2")
    stage(client, log_fine_tune("bot"))


def test_a_lock_is_revoked_by_its_digest_under_any_number_that_it_had(client: MlflowClient) -> None:
    register_lock(base_lock(seed=0))
    client.copy_model_version(f"models:/{NAME}/1", NAME)
    client.delete_model_version(NAME, "2")
    revoked = store_of(client).revoke_lock(NAME, 2, "too strong", base_lock(seed=0).digest)
    assert (revoked.version, revoked.digest) == (1, base_lock(seed=0).digest)


@pytest.mark.parametrize("missing", ["reject", "allow"])
def test_a_base_whose_lock_was_deleted_is_none_without_a_lock(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    policy = f"version: 1\ngates: [{{missing_lock: {missing}}}]\n"
    client = open_with_policy(tmp_path, monkeypatch, policy)
    version, name = log_fine_tune("bot"), lock_model_name(BASE)
    register_lock(base_lock())
    client.delete_model_version(name, "1")
    before = state_of(client, "bot", version)
    refused = rf"lock_gone.*safelock lock revoke models:/{name}/1 --digest {base_lock().digest}"
    with pytest.raises(MlflowException, match=refused) as info:
        stage(client, version)
    assert info.value.error_code == "PERMISSION_DENIED"
    assert state_of(client, "bot", version) == before
    client.delete_registered_model(name)
    with pytest.raises(MlflowException, match="lock_gone"):
        stage(client, version)
    register_lock(base_lock())
    stage(client, version)
    assert loaded_biases(), "the first way out: it is registered again"
    client.delete_registered_model(name)
    store_of(client).revoke_lock(name, 1, "too strong", base_lock().digest)
    second = log_fine_tune("bot")
    if missing == "allow":
        stage(client, second)
        assert ledger_rows(tmp_path)[-1]["event"] == "passed", "the second one: it is revoked"
    else:
        with pytest.raises(MlflowException, match="missing_lock"):
            stage(client, second)


def test_a_lock_does_not_come_off_because_it_is_gone(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = "version: 1\ngates: [{missing_lock: allow, lock: {revoked: refuse}}]\n"
    client = open_with_policy(tmp_path, monkeypatch, policy)
    version, _ = locked_version(client)
    name = lock_model_name(BASE)
    copied = client.copy_model_version(f"models:/bot/{version}", "copy")
    store_of(client).revoke_lock(name, 1, "leaked")
    client.delete_model_version(name, "1")
    explained = explain(store_of(client)._gate, to_staging("bot", version))
    assert explained.refusal is not None
    assert explained.refusal.reason == "still_locked"
    with pytest.raises(MlflowException, match=r"still_locked.*safelock unlock models:/bot/1"):
        stage(client, version)
    with pytest.raises(MlflowException, match=r"lock_revoked.*leaked"):
        download_uri(client, version)
    with pytest.raises(MlflowException, match="still_locked"):
        stage(client, int(copied.version), "copy")
    client.transition_model_version_stage("bot", str(version), "None")
    original = store_of(client).unlock("bot", version, "its lock leaked, and there is no other")
    stage(client, version)
    assert download_uri(client, version) == original, "the way out"


def test_nor_is_one_that_is_revoked_while_it_is_being_applied(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    before = state_of(client, "bot", version)
    stock = RegistryArtifacts.publish

    def revoked_meanwhile(self: RegistryArtifacts, folder: Path, uri: str) -> None:
        stock(self, folder, uri)
        store_of(client).revoke_lock(lock_model_name(BASE), 1, "leaked")

    monkeypatch.setattr(RegistryArtifacts, "publish", revoked_meanwhile)
    with pytest.raises(MlflowException, match=r"lock_revoked.*leaked") as info:
        stage(client, version)
    assert info.value.error_code == "PERMISSION_DENIED"
    assert state_of(client, "bot", version) == before
    events = [(row["event"], row["reason"]) for row in ledger_rows(tmp_path)]
    assert events == [("revoked", "revoked"), ("rejected", "lock_revoked")]
    assert store_of(client)._gate.registry.works_held() == [], "whoever is next waits for nobody"


def test_a_tag_that_comes_back_brings_the_floor_by_the_first_number(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagged = "{tags: {risk: high}, lock: {min_version: 2}}"
    client = open_with_policy(tmp_path, monkeypatch, f"version: 1\ngates: [{tagged}, {{}}]\n")
    version = log_fine_tune("bot")
    register_lock(base_lock())
    client.copy_model_version(f"models:/{NAME}/1", NAME)
    stage(client, version)
    assert download_uri(client, version)
    client.set_model_version_tag("bot", str(version), "risk", "high")
    with pytest.raises(MlflowException, match="not_locked"):
        download_uri(client, version)


@pytest.fixture
def mixed(client: MlflowClient, tmp_path: Path) -> MlflowClient:
    """A registry with a lock and something else in one registered model, ``mixed``."""
    log_prices()
    register_lock(base_lock())
    with stock_registry(tmp_path):
        MlflowClient().rename_registered_model(NAME, "mixed")
        MlflowClient().copy_model_version("models:/prices/1", "mixed")
    return client


@pytest.mark.parametrize("name", ["mixed", "prices"])
def test_a_model_of_something_else_gets_no_locks_name(mixed: MlflowClient, tmp_path: Path, name: str) -> None:
    before = mixed.get_registered_model(name).last_updated_timestamp
    with pytest.raises(MlflowException, match=rf"rename '{name}'.*no_lock") as info:
        mixed.rename_registered_model(name, NAME)
    assert info.value.error_code == "PERMISSION_DENIED"
    assert mixed.get_registered_model(name).last_updated_timestamp == before, "not for a moment"
    row = ledger_rows(tmp_path)[-1]
    assert (row["event"], row["reason"], row["target"]) == ("rejected", "no_lock", f"rename:{NAME}")
    assert (row["model"], row["version"]) == (name, 2 if name == "mixed" else 1)


def test_nor_does_one_that_came_while_it_was_looked_at(
    mixed: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed.delete_model_version("mixed", "2")
    check = Renaming.check

    def checked(*arguments: Any) -> None:
        check(*arguments)
        mixed.copy_model_version("models:/prices/1", "mixed")

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Renaming, "check", checked)
        with pytest.raises(MlflowException, match=r"rename 'mixed'.*no_lock"):
            mixed.rename_registered_model("mixed", NAME)
    assert mixed.get_registered_model("mixed").latest_versions
    assert [(row["event"], row["version"]) for row in ledger_rows(tmp_path)] == [("rejected", 3)]
    mixed.delete_model_version("mixed", "3")
    mixed.rename_registered_model("mixed", NAME)
    stage(mixed, log_fine_tune("bot"))


def test_where_its_former_name_was_taken_meanwhile_that_is_told(
    mixed: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Renaming.check_what_came

    def taken(*arguments: Any) -> None:
        mixed.create_registered_model("mixed")
        check(*arguments)

    monkeypatch.setattr(Renaming, "check", lambda *_: None)
    monkeypatch.setattr(Renaming, "check_what_came", taken)
    with pytest.raises(MlflowException, match=r"no_lock.*is called .* by now.*Rename it, or delete") as info:
        mixed.rename_registered_model("mixed", NAME)
    assert info.value.error_code == "RESOURCE_CONFLICT"
    version = log_fine_tune("bot")
    with pytest.raises(MlflowException, match="damaged_lock"):
        stage(mixed, version)
    mixed.delete_model_version(NAME, "2")
    stage(mixed, version)


def test_a_model_gets_no_locks_name_while_somebody_registers_one_there(
    mixed: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_ledger, "LONGEST_WAIT", 0.2)
    mixed.delete_model_version("mixed", "2")
    registry = store_of(mixed)._gate.registry
    with (
        registry.lease(Work("default", NAME, 0, "register")),
        pytest.raises(MlflowException, match=r"rename 'mixed'.*\[conflict\].*A new version of"),
    ):
        mixed.rename_registered_model("mixed", NAME)
    mixed.rename_registered_model("mixed", NAME)
    assert registry.works_held() == []


def test_what_came_past_the_gate_and_is_no_lock_stands_in_nobodys_way(
    mixed: MlflowClient, tmp_path: Path
) -> None:
    with stock_registry(tmp_path):
        MlflowClient().rename_registered_model("mixed", NAME)
    register_lock(base_lock(seed=1))
    assert digests_on_record(mixed) == digests(0, 1)


def test_one_whose_store_is_gone_stands_in_nobodys_way_once_it_is_on_record(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        with stock_registry(tmp_path):
            register_lock(base_lock(seed=seed))
        if seed == 0:
            register_lock(base_lock(seed=2))
    stock = LockRecords._lock_at
    gone = client.get_model_version_download_uri(NAME, "1"), client.get_model_version_download_uri(NAME, "3")

    def lock_at(self: LockRecords, location: str, origin: str) -> SafetyLock:
        if location in gone:
            raise UnreachableError(f"{location} cannot be reached: it does not answer now.")
        return stock(self, location, origin)

    monkeypatch.setattr(LockRecords, "_lock_at", lock_at)
    with pytest.raises(MlflowException, match=r"unreachable.*version 3 of .*delete that version"):
        register_lock(base_lock(seed=4))
    client.delete_model_version(NAME, "3")
    register_lock(base_lock(seed=4))
    assert digests_on_record(client) == digests(0, 2, 4)


def test_nor_does_another_version_of_one_that_is_on_record(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        register_lock(base_lock(seed=0))
    gone, stock = client.get_model_version_download_uri(NAME, "2"), LockRecords._lock_at

    def lock_at(self: LockRecords, location: str, origin: str) -> SafetyLock:
        if location == gone:
            raise UnreachableError(f"{location} cannot be reached: it does not answer now.")
        return stock(self, location, origin)

    monkeypatch.setattr(LockRecords, "_lock_at", lock_at)
    register_lock(base_lock(seed=1))
    assert digests_on_record(client) == digests(0, 1)


def test_the_lowest_number_of_a_lock_is_its_first_whichever_was_on_record_first(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("bot")
    with stock_registry(tmp_path):
        for _ in range(2):
            register_lock(base_lock())
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{lock: {min_version: 2}}]\n")
    stage(client, version)
    assert ledger_rows(tmp_path)[-1]["first_version"] == 2, "as far as the ledger tells"
    client.delete_model_version(NAME, "2")
    with pytest.raises(MlflowException, match=r"lock_too_old.*version 1, and"):
        stage(client, version)
    register_lock(base_lock())
    with pytest.raises(MlflowException, match=r"lock_too_old.*version 3, which was .* version 1 first"):
        stage(client, version)
    told = [fault for row in audit(f"sqlite:///{tmp_path}/registry.db") for fault in row.lock_faults]
    assert any("registered as version 1 first" in fault for fault in told), told


def test_reconciling_puts_no_lock_back_in_force_that_was_revoked_meanwhile(
    client: MlflowClient, tmp_path: Path
) -> None:
    version, original = locked_version(client)
    edit_row(tmp_path, "UPDATE model_versions SET storage_location = ? WHERE name = 'bot'", original)
    reconciling, actor = store_of(client).reconciling, Actor(name="ops", verified=False)
    found = reconciling.examine("bot", version, "default", actor)
    assert found.remedy.done == "restored"
    store_of(client).revoke_lock(NAME, 1, "leaked")
    repaired = reconciling.repair(found, ("lock",))
    assert (repaired.done, repaired.refusal.reason) == (None, "lock_revoked")
    assert [row["event"] for row in ledger_rows(tmp_path)] == ["promoted", "revoked"]
    with pytest.raises(MlflowException, match="not_locked"):
        download_uri(client, version)


def test_tags_come_back_to_what_runs_a_lock_that_was_revoked(client: MlflowClient, tmp_path: Path) -> None:
    version, _ = locked_version(client)
    store_of(client).revoke_lock(NAME, 1, "leaked")
    client.set_model_version_tag("bot", str(version), "safelock.applied_alpha", "99")
    reconciling, actor = store_of(client).reconciling, Actor(name="ops", verified=False)
    found = reconciling.examine("bot", version, "default", actor)
    repaired = reconciling.repair(found, ("lock",))
    assert (repaired.done, repaired.refusal) == ("restored", None)
    assert client.get_model_version("bot", str(version)).tags["safelock.applied_alpha"] == "6"
    assert ledger_rows(tmp_path)[-1]["event"] == "reconciled"
    assert loaded_biases(), "it goes on running what it ran"


def test_what_ran_a_lock_that_was_revoked_goes_back_to_its_own_fine_tune(
    client: MlflowClient, tmp_path: Path
) -> None:
    """The gate refuses to lock it, and nobody is handed out what somebody wrote into its row."""
    version, original = locked_version(client)
    elsewhere = download_uri(client, log_fine_tune("stranger"), "stranger")
    store_of(client).revoke_lock(NAME, 1, "leaked")
    edit_row(tmp_path, "UPDATE model_versions SET storage_location = ? WHERE name = 'bot'", elsewhere)
    reconciling, actor = store_of(client).reconciling, Actor(name="ops", verified=False)
    repaired = reconciling.repair(reconciling.examine("bot", version, "default", actor), ("lock",))
    assert repaired.refusal.reason == "lock_revoked"
    assert store_of(client)._gate.registry.model_version("bot", version).location == original
    assert [row["event"] for row in ledger_rows(tmp_path)] == ["promoted", "revoked", "reconciled"]
