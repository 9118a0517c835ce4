"""Leases: one at work on a version at a time, and nobody waits for the dead."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.errors import PromotionRefused
from mlflow_safelock.gate import leases
from mlflow_safelock.gate.leases import Work
from mlflow_safelock.registry import sql, sql_ledger
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from tests.registries import base_lock, log_fine_tune, register_lock
from tests.registry.test_guard import store_of
from tests.registry.test_promotion import ledger_rows, stage

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

WORK = Work("default", "bot", 1)


@pytest.fixture
def registry(client: MlflowClient) -> sql.SqlRegistry:
    return sql.SqlRegistry(store_of(client))


def rows(registry: sql.SqlRegistry) -> list[Any]:
    with registry.store.engine.connect() as connection:
        return list(connection.execute(sa.select(leases.TABLE)))


def hold(registry: sql.SqlRegistry, holder: str, *, seconds: float = 60.0) -> None:
    with registry.store.engine.begin() as connection:
        connection.execute(
            leases.TABLE.insert().values(**WORK.key, holder=holder, expires=time.time() + seconds)
        )


def test_whoever_asks_meanwhile_waits_until_it_is_given_back(registry: sql.SqlRegistry) -> None:
    order: list[str] = []
    asked = threading.Event()

    def second() -> None:
        asked.set()
        with registry.lease(WORK):
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        with registry.lease(WORK):
            waiting = pool.submit(second)
            asked.wait()
            time.sleep(0.3)
            order.append("first")
        waiting.result(timeout=30)
    assert order == ["first", "second"]
    assert rows(registry) == []


def test_other_versions_and_other_work_do_not_wait(registry: sql.SqlRegistry) -> None:
    with (
        registry.lease(WORK),
        registry.lease(Work("default", "bot", 2)),
        registry.lease(Work("default", "bot", 1, "prepare")),
        registry.lease(Work("other", "bot", 1)),
    ):
        assert len(rows(registry)) == 4


def test_who_waits_too_long_is_refused_and_told_for_whom(
    registry: sql.SqlRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_ledger, "LONGEST_WAIT", 0.2)
    with (
        registry.lease(WORK),
        pytest.raises(PromotionRefused, match="is still being worked on by process") as info,
        registry.lease(WORK),
    ):
        raise AssertionError("two were at work")
    assert info.value.reason == "conflict"


def test_who_waits_for_the_writing_of_a_locked_model_is_told_which(
    registry: sql.SqlRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_ledger, "LONGEST_WAIT", 0.2)
    work = Work.writing("s3://models/bot-safelock/standalone-1")
    with (
        registry.lease(work),
        pytest.raises(PromotionRefused, match="model at s3://models/bot-safelock/standalone-1 is still"),
        registry.lease(Work.writing("s3://models/bot-safelock/standalone-1")),
    ):
        pass


def test_the_lease_of_a_process_that_is_gone_is_free_at_once(
    registry: sql.SqlRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_ledger, "LONGEST_WAIT", 1.0)
    made = "from mlflow_safelock.gate.leases import new_holder; print(new_holder())"
    holder = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, check=True).stdout
    hold(registry, holder.strip())
    assert leases.is_gone(holder.strip())
    with registry.lease(WORK):
        (row,) = rows(registry)
        assert row.holder != holder.strip()


def test_the_lease_of_another_machine_is_free_once_it_has_expired(
    registry: sql.SqlRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_ledger, "LONGEST_WAIT", 3.0)
    hold(registry, "elsewhere/pid:[1]|1|1|abc", seconds=1.0)
    begun = time.monotonic()
    with registry.lease(WORK):
        assert time.monotonic() - begun > 0.5
        (row,) = rows(registry)
        assert not row.holder.startswith("elsewhere")


def test_an_unlocking_counts_as_under_way_until_it_is_given_back_or_late(registry: sql.SqlRegistry) -> None:
    unlocking = Work(WORK.workspace, WORK.model, WORK.version, "unlock")
    of_it = WORK.workspace, WORK.model, WORK.version
    assert not registry.is_unlocked(*of_it)
    with registry.lease(WORK):
        assert not registry.is_unlocked(*of_it), "a promotion is none"
        with registry.lease(unlocking):
            assert registry.is_unlocked(*of_it)
            assert not registry.is_unlocked("default", "bot", 2)
            with registry.store.engine.begin() as connection:
                connection.execute(leases.TABLE.update().values(expires=time.time() - 1))
            assert not registry.is_unlocked(*of_it)
            with registry.store.engine.begin() as connection:
                machine = leases.new_holder().split("|")[0]
                gone = {"holder": f"{machine}|999999999|1|x", "expires": time.time() + 60}
                connection.execute(leases.TABLE.update().values(**gone))
            assert not registry.is_unlocked(*of_it)


def test_a_lease_that_was_taken_over_is_not_given_back_by_its_first_holder(
    registry: sql.SqlRegistry,
) -> None:
    with registry.lease(WORK), registry.store.engine.begin() as connection:
        connection.execute(leases.TABLE.update().values(holder="elsewhere/pid:[1]|1|1|abc"))
    (row,) = rows(registry)
    assert row.holder == "elsewhere/pid:[1]|1|1|abc"


def test_a_request_that_is_posted_again_does_the_work_once(
    client: MlflowClient, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    published: list[str] = []
    publish = RegistryArtifacts.publish

    def slowly(self: RegistryArtifacts, folder: Any, uri: str) -> None:
        published.append(uri)
        time.sleep(0.5)
        publish(self, folder, uri)

    monkeypatch.setattr(RegistryArtifacts, "publish", slowly)
    with ThreadPoolExecutor(4) as pool:
        for posted in [pool.submit(stage, client, version) for _ in range(4)]:
            posted.result(timeout=60)
    assert len(published) == 1
    assert [row["event"] for row in ledger_rows(tmp_path)] == ["promoted"]


def test_a_version_that_somebody_is_at_work_on_for_too_long_is_a_conflict_with_a_row(
    client: MlflowClient, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock())
    monkeypatch.setattr(sql_ledger, "LONGEST_WAIT", 0.2)
    hold(sql.SqlRegistry(store_of(client)), "elsewhere/pid:[1]|1|1|abc")
    with pytest.raises(MlflowException, match=r"\[conflict\].*still being worked on") as info:
        stage(client, version)
    assert info.value.error_code == "RESOURCE_CONFLICT"
    assert [row["reason"] for row in ledger_rows(tmp_path)] == ["conflict"]
