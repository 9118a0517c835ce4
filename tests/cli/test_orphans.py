"""``safelock reconcile --sweep``: what nobody needs goes, and nothing else does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from mlflow_safelock.gate import leases
from mlflow_safelock.gate.leases import Work
from mlflow_safelock.gate.ports import LockedFolder
from mlflow_safelock.operations.sweeping import Sweeping
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from mlflow_safelock.registry.sql import SqlRegistry
from tests.cli.conftest import Run
from tests.registries import base_lock, biases_of, files_below, log_fine_tune, register_lock
from tests.registry.dying import Place
from tests.registry.dying import run as run_and_die
from tests.registry.test_guard import edit_row
from tests.registry.test_promotion import ledger_rows, open_with_policy, stage

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

STAGE = "transition_model_version_stage"
STANDALONE = 'version: 1\ngates:\n  - {models: "whole*", carrier: standalone}\n  - {}\n'


def place_of(folder: Path) -> Place:
    policy = folder / "safelock.yaml"
    if not policy.exists():
        policy.write_text(STANDALONE)
    return Place(
        f"sqlite:///{folder}/tracking.db", f"safelock+sqlite:///{folder}/registry.db", policy, folder
    )


def killed(folder: Path, failpoint: str, action: str, *arguments: Any) -> None:
    """Have another process die in the midst of something."""
    assert run_and_die(place_of(folder), action, *arguments, failpoint=failpoint) == -9


def new_version(client: MlflowClient, name: str = "bot") -> int:
    if not client.search_registered_models(f"name='{name}'"):
        client.create_registered_model(name)
    source = client.get_model_version("bot", "1").source
    return int(client.create_model_version(name, source).version)


def location(client: MlflowClient, version: int, name: str = "bot") -> Path:
    return Path(client.get_model_version_download_uri(name, str(version)).removeprefix("file://"))


@pytest.fixture
def beside(client: MlflowClient) -> Path:
    """The folder of locked models beside the fine-tune of version 1, and a lock for it."""
    log_fine_tune("bot")
    register_lock(base_lock())
    return Path(f"{location(client, 1)}-safelock")


def test_what_no_version_and_no_row_needs_goes_and_everything_else_stays(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], beside: Path
) -> None:
    # Needed: version 1, a copy of a version that is deleted, a model that was renamed twice; now and before.
    stage(client, 1)
    new_version(client)
    stage(client, 2)
    client.copy_model_version("models:/bot/2", "copy")
    client.delete_model_version("bot", "2")
    renamed = new_version(client, "old-name")
    stage(client, renamed, "old-name")
    register_lock(base_lock(seed=1))
    stage(client, 1)
    stage(client, renamed, "old-name")
    client.rename_registered_model("old-name", "new-name")
    register_lock(base_lock(seed=2))
    stage(client, renamed, "new-name")
    client.rename_registered_model("new-name", "third-name")
    needed = files_below(beside)
    assert len({path.partition("/")[0] for path in needed}) == 6
    # Nobody's: of deleted versions, and of runs that died.
    deleted = new_version(client)
    stage(client, deleted)
    client.delete_model_version("bot", str(deleted))
    killed(tmp_path, "overlay-published", STAGE, "bot", str(new_version(client)), "Staging")
    killed(tmp_path, "artifacts-aside", STAGE, "bot", str(new_version(client)), "Staging")
    # Not ours, though some look like it.
    foreign = (
        "notes.txt",
        "manifests/a.json",
        "0123456789abcdef/MLmodel",
        "standalone-x/MLmodel",
        f"{32 * 'a'}",
    )
    for path in foreign:
        (beside / path).parent.mkdir(exist_ok=True)
        (beside / path).write_text("ours")
    outside = beside.parent / (32 * "b")
    outside.mkdir()
    (outside / "MLmodel").write_text("ours")
    (beside / (32 * "c")).symlink_to(outside)
    before = files_below(tmp_path)

    listed = run("reconcile", "--sweep", *gated, "--format", "json").json
    whys = sorted(orphan["why"].split(",")[0] for orphan in listed)
    assert whys == ["it was begun and never finished", *2 * ["no version is served from it"]]
    assert all(Path(orphan["location"]).parent == beside for orphan in listed)
    for orphan in listed:
        files = [path for path in Path(orphan["location"]).rglob("*") if path.is_file()]
        assert (orphan["bytes"], orphan["files"]) == (sum(p.stat().st_size for p in files), len(files))
    table = run("reconcile", "--sweep", *gated).stdout
    assert f"{len(listed)} that nobody needs, {sum(orphan['bytes'] for orphan in listed)} bytes" in table
    assert files_below(tmp_path) == before, "listing deletes nothing"

    done = run("reconcile", "--sweep", "--yes", *gated, "--format", "json")
    assert done.exit_code == 0
    assert {orphan["location"] for orphan in done.json if orphan["deleted"]} == {
        orphan["location"] for orphan in listed
    }
    gone = {f"{Path(orphan['location']).relative_to(tmp_path)}/" for orphan in listed}
    after = files_below(tmp_path)
    assert before - after == {path for path in before if any(path.startswith(one) for one in gone)}
    assert needed <= files_below(beside)
    for uri in ("models:/bot/1", "models:/copy/1", "models:/third-name/1"):
        assert biases_of(mlflow.pyfunc.load_model(uri)._model_impl.pipeline.model)
    row = ledger_rows(tmp_path)[-1]
    assert (row["event"], row["reason"], row["target"]) == ("reconciled", "swept", "sweep:artifacts")
    assert all(orphan["location"] in row["message"] for orphan in listed)
    assert run("reconcile", "--sweep", "--yes", *gated, "--format", "json").json == []


def test_what_somebody_is_at_work_on_stays(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], beside: Path
) -> None:
    stage(client, 1)
    needed = files_below(beside)
    register_lock(base_lock(seed=1))
    killed(tmp_path, "overlay-published", STAGE, "bot", "1", "Staging")
    before = files_below(beside)
    assert before > needed
    registry = SqlRegistry(client._get_registry_client().store)
    for work in (Work("default", "bot", 1), Work("default", "bot", 1, "prepare")):
        with registry.lease(work):
            assert run("reconcile", "--sweep", "--yes", *gated, "--format", "json").json == []
    # Though its row leads somewhere else: whoever is at work locks it from where it was.
    edit_row(tmp_path, "UPDATE model_versions SET storage_location='/elsewhere' WHERE name='bot'")
    with registry.lease(Work("default", "bot", 1)):
        assert run("reconcile", "--sweep", "--yes", *gated, "--format", "json").json == []
    assert files_below(beside) == before
    assert run("reconcile", "--sweep", "--yes", *gated).exit_code == 0
    assert files_below(beside) == needed
    with registry.store.engine.connect() as connection:
        assert not list(connection.execute(leases.TABLE.select()))


def test_what_is_promoted_while_the_folders_are_listed_is_no_orphan(
    client: MlflowClient, tmp_path: Path, beside: Path
) -> None:
    class Meanwhile(RegistryArtifacts):
        """A store that takes so long to list that a promotion begins and ends in the meantime."""

        def locked_folders(self, original: str) -> Sequence[LockedFolder]:
            stage(client, 1)
            found = super().locked_folders(original)
            assert found or original != str(beside).removesuffix("-safelock")
            return found

    gate = client._get_registry_client().store.reconciling.gate
    sweeping = Sweeping(f"sqlite:///{tmp_path}/registry.db", replace(gate, artifacts=Meanwhile()))
    assert sweeping.orphans() == ()
    assert files_below(beside)


def test_what_is_needed_by_the_time_it_would_be_deleted_stays(
    client: MlflowClient, tmp_path: Path, beside: Path
) -> None:
    stage(client, new_version(client))
    orphaned = location(client, 2)
    client.delete_model_version("bot", "2")
    listings: list[str] = []

    class Meanwhile(RegistryArtifacts):
        """A store that takes so long to list that somebody needs again what was listed as an orphan."""

        def locked_folders(self, original: str) -> Sequence[LockedFolder]:
            found = super().locked_folders(original)
            listings.extend([original] if found else [])
            if len(listings) == 3:
                statement = "UPDATE model_versions SET storage_location=? WHERE name='bot' AND version=1"
                edit_row(tmp_path, statement, str(orphaned))
            return found

    gate = client._get_registry_client().store.reconciling.gate
    sweeping = Sweeping(f"sqlite:///{tmp_path}/registry.db", replace(gate, artifacts=Meanwhile()))
    listed = sweeping.orphans()
    assert [orphan.folder.location for orphan in listed] == [str(orphaned)]
    assert [swept.kept for swept in sweeping.delete(listed)] == ["it is needed by now"]
    assert len(listings) == 3, "listed, listed again, and beside this fine-tune"
    assert (orphaned / "MLmodel").is_file()


def test_what_clients_with_a_ledger_of_their_own_wrote_is_not_swept(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], beside: Path
) -> None:
    original = location(client, 1)
    stage(client, 1)
    # As safelock+http leaves it: the server's row is as it was but for tags, and the ledger is elsewhere.
    shutil.copy(tmp_path / "registry.db", tmp_path / "clients.db")
    edit_row(tmp_path, "DELETE FROM safelock_ledger WHERE event='promoted'")
    edit_row(tmp_path, "UPDATE model_versions SET storage_location=? WHERE name='bot'", f"file://{original}")
    before = files_below(beside)
    sweep = ("reconcile", "--sweep", *gated, "--format", "json")
    for options in ((), ("--yes",)):
        done = run(*sweep, *options)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "'bot' version 1 has the tags of a promotion that is in no ledger known here" in done.stderr
        assert "Next: Name their ledger: --ledger URI" in done.stderr
    assert run(*sweep, "--yes", "--ledger", f"sqlite:///{tmp_path}/clients.db").json == []
    assert files_below(beside) == before
    done = run(*sweep, "--ledger", f"sqlite:///{tmp_path}/tracking.db")
    assert "There is no ledger in the database" in done.stderr
    (orphan,) = run(*sweep, "--only-this-ledger").json
    folder = Path(local_file_uri_to_path(orphan["location"]))
    assert (folder.parent, orphan["deleted"]) == (beside, False)
    assert run("reconcile", "--only-this-ledger", *gated).exit_code == 2


def test_prepared_standalone_models_of_living_versions_stay(
    run: Run,
    client: MlflowClient,
    tmp_path: Path,
    gated: tuple[str, ...],
    beside: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = open_with_policy(tmp_path, monkeypatch, STANDALONE)
    version = new_version(client, "whole")
    killed(tmp_path, "standalone-aside", "prepare", "whole", version)
    assert run("prepare", f"models:/whole/{version}", *gated).exit_code == 0
    (prepared,) = beside.glob("standalone-*")
    for file in (prepared / "MLmodel", prepared / "model" / "config.json"):
        assert file.is_file()
    half = beside / f"standalone-{32 * '0'}"
    shutil.copytree(prepared, half)
    (half / "MLmodel").unlink()
    swept = run("reconcile", "--sweep", "--yes", *gated, "--format", "json").json
    assert {one["why"] for one in swept} <= {
        "it was begun and never finished",
        "no version is served from it, and the ledger names it for none that is there",
    }
    assert not half.exists()
    assert [path.name for path in beside.iterdir()] == [prepared.name]
    stage(client, version, "whole")
    assert biases_of(mlflow.transformers.load_model("models:/whole/Staging").model)
    weights = location(client, 1) / "model" / "model.safetensors"
    client.delete_registered_model("whole")
    client.delete_registered_model("bot")
    (orphan,) = run("reconcile", "--sweep", "--yes", *gated, "--format", "json").json
    assert orphan["deleted"]
    assert weights.is_file(), "what a standalone model shared with its fine-tune stays"
    assert not any(beside.iterdir())


def test_with_a_ledger_that_cannot_be_read_nothing_is_deleted(
    run: Run, client: MlflowClient, tmp_path: Path, gated: tuple[str, ...], beside: Path
) -> None:
    stage(client, 1)
    killed(tmp_path, "overlay-published", STAGE, "bot", str(new_version(client)), "Staging")
    edit_row(
        tmp_path, "UPDATE safelock_ledger SET body=replace(body, 'default', 'defaulx') WHERE model='bot'"
    )
    before = files_below(beside)
    done = run("reconcile", "--sweep", "--yes", *gated)
    assert done.exit_code == 1
    assert "was edited" in done.stderr
    assert files_below(beside) == before


def test_sweeping_goes_by_itself(run: Run, gated: tuple[str, ...]) -> None:
    assert run("reconcile", "--sweep", "--lock", *gated).exit_code == 2
    assert run("reconcile", "--yes", *gated).exit_code == 2
