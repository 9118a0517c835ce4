"""``safelock doctor`` finds what is wrong with an installation, says what to do, and changes nothing."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.cli.conftest import Outcome, Run
from tests.keys import write_keys
from tests.operations.rivals import rival_package
from tests.registry.s3_server import s3_server
from tests.servers import mlflow_server, postgresql
from tests.sigstore_instance import ISSUER, SigstoreInstance


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("SAFELOCK_")]:
        monkeypatch.delenv(name)


def checks(done: Outcome) -> dict[str, dict[str, Any]]:
    return {check["check"]: check for check in done.json["checks"]}


def faults(done: Outcome) -> set[str]:
    """The checks that must be fixed; the exit code is 1 where there are any."""
    found = {name for name, check in checks(done).items() if check["status"] == "fault"}
    assert done.exit_code == (1 if found else 0)
    assert done.json["status"] == ("fault" if found else "ok")
    assert all(checks(done)[name]["next_step"] for name in found), "each says what to do"
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sound_installation_is_found_sound_and_left_as_it_was(
    run: Run, gated: tuple[str, ...], tmp_path: Path
) -> None:
    before = contents(tmp_path)
    done = run(
        "doctor", *gated, "--artifacts-destination", tmp_path / "new" / "artifacts", "--format", "json"
    )
    assert faults(done) == set()
    status = {name: check["status"] for name, check in checks(done).items()}
    assert {name for name, found in status.items() if found != "ok"} == {"keys", "authentication", "clock"}
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()
    assert checks(done)["registry"]["facts"]["package"] == "mlflow-safelock"
    assert checks(done)["versions"]["facts"]["mlflow"]
    gate = checks(done)["policy"]["facts"]["gates"][0]
    assert (gate["models"], gate["stages"]) == ("*", ["Staging", "Production"])
    table = run("doctor", *gated)
    assert table.exit_code == 0
    assert "SAFELOCK_POLICY" in table.stdout
    assert "must fix" not in table.stdout


@pytest.mark.parametrize(
    ("addresses", "said", "next_step"),
    [
        (["--registry-uri", "sqlite+safelock:///r.db"], "wrong order", "safelock+sqlite"),
        (["--registry-uri", "sqlite:///r.db"], "no gate in front", "safelock+sqlite"),
        (["--tracking-uri", "sqlite:///t.db"], "No registry is named", "safelock+sqlite"),
        ([], "No registry is named", "safelock+sqlite"),
        (["--tracking-uri", "safelock+sqlite:///t.db"], "only registries have", "--registry-uri"),
        (["--registry-uri", "safelock+mssql:///r.db"], "No installed package answers", "docs/gate.md"),
    ],
)
def test_a_registry_without_its_gate_must_be_fixed(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    addresses: list[str],
    said: str,
    next_step: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("doctor", *addresses, "--format", "json")
    assert "registry" in faults(done)
    assert said in checks(done)["registry"]["message"]
    assert next_step in checks(done)["registry"]["next_step"]
    assert not list(tmp_path.glob("*.db")), "no database was made by looking for one"
    assert "Error: " in done.stderr


def test_the_policy_is_told_with_its_file_or_with_its_faults(
    run: Run, gated: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "safelock.yaml"
    monkeypatch.setenv("SAFELOCK_POLICY", str(path))
    path.write_text("version: 1\ngates: [{models: 'bot-*'}, {}]\n")
    done = run("doctor", *gated, "--format", "json")
    assert faults(done) == set()
    assert [gate["models"] for gate in checks(done)["policy"]["facts"]["gates"]] == ["bot-*", "*"]
    assert checks(done)["policy"]["facts"]["file"] == str(path)
    path.write_text("version: 1\ngates: [{modles: 'bot-*'}]\n")
    done = run("doctor", *gated, "--format", "json")
    assert faults(done) == {"policy"}
    assert "line 2" in checks(done)["policy"]["message"]


class TestTheDatabase:
    def execute(self, tmp_path: Path, *statements: str) -> None:
        with sqlite3.connect(tmp_path / "registry.db") as connection:
            for statement in statements:
                connection.execute(statement)

    def test_without_a_ledger_must_be_fixed(self, run: Run, gated: tuple[str, ...], tmp_path: Path) -> None:
        self.execute(tmp_path, "DROP TABLE safelock_ledger", "DROP TABLE safelock_schema")
        done = run("doctor", *gated, "--format", "json")
        assert faults(done) == {"ledger"}
        assert checks(done)["schema"]["status"] == "warning"

    def test_with_tables_of_a_newer_version_must_be_fixed(
        self, run: Run, gated: tuple[str, ...], tmp_path: Path
    ) -> None:
        self.execute(tmp_path, "UPDATE safelock_schema SET version = 99")
        done = run("doctor", *gated, "--format", "json")
        assert faults(done) == {"schema"}
        assert "Upgrade mlflow-safelock" in checks(done)["schema"]["next_step"]

    def test_of_an_older_version_is_told(self, run: Run, gated: tuple[str, ...], tmp_path: Path) -> None:
        self.execute(tmp_path, "UPDATE safelock_schema SET version = 1")
        done = run("doctor", *gated, "--format", "json")
        assert faults(done) == set()
        assert checks(done)["schema"]["status"] == "warning"

    def test_that_is_no_registry_must_be_fixed(self, run: Run, tmp_path: Path) -> None:
        sqlite3.connect(tmp_path / "empty.db").execute("CREATE TABLE x (y)").connection.commit()
        uri = f"safelock+sqlite:///{tmp_path}/empty.db"
        done = run("doctor", "--registry-uri", uri, "--tracking-uri", "sqlite:///t.db", "--format", "json")
        assert faults(done) == {"database"}

    def test_whose_driver_is_missing_is_told_how_to_get_it(self, run: Run) -> None:
        done = run("doctor", "--registry-uri", "safelock+mysql://u:hunter2@h/db", "--format", "json")
        assert "database" in faults(done)
        assert "pip install" in checks(done)["database"]["next_step"]
        assert "hunter2" not in done.stdout + done.stderr


class TestTheDestination:
    def test_in_whose_place_a_file_is_must_be_fixed(
        self, run: Run, gated: tuple[str, ...], tmp_path: Path
    ) -> None:
        (tmp_path / "artifacts").write_text("a file")
        done = run("doctor", *gated, "--artifacts-destination", tmp_path / "artifacts", "--format", "json")
        assert faults(done) == {"artifacts"}

    def test_on_s3_is_written_and_left_as_it_was_and_its_errors_are_named(
        self, run: Run, gated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import boto3

        with s3_server() as server:
            for name, value in {
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_MAX_ATTEMPTS": "1",
                "MLFLOW_S3_ENDPOINT_URL": server.url,
            }.items():
                monkeypatch.setenv(name, value)
            store = boto3.client("s3", endpoint_url=server.url)
            store.create_bucket(Bucket="models")

            def look(destination: str) -> Outcome:
                return run("doctor", *gated, "--artifacts-destination", destination, "--format", "json")

            assert faults(look("s3://models/mlflow")) == set()
            assert any(
                passed.method == "PUT" and "safelock-doctor" in passed.target for passed in server.passed
            )
            assert "Contents" not in store.list_objects_v2(Bucket="models")
            missing = look("s3://nothing/mlflow")
            assert faults(missing) == {"artifacts"}
            assert "is not there" in checks(missing)["artifacts"]["message"]
            server.fail("denied", method="PUT", containing="safelock-doctor")
            denied = look("s3://models/mlflow")
            assert faults(denied) == {"artifacts"}
            assert "s3:PutObject" in checks(denied)["artifacts"]["next_step"]


class TestVersions:
    @pytest.fixture
    def packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder that packages are looked for in first."""
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        return tmp_path / "packages"

    def install(self, packages: Path, name: str, version: str) -> None:
        folder = packages / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def test_that_this_package_was_not_made_for_must_be_fixed(
        self, run: Run, gated: tuple[str, ...], packages: Path
    ) -> None:
        self.install(packages, "transformers", "4.57.0")
        done = run("doctor", *gated, "--format", "json")
        assert faults(done) == {"versions"}
        assert "transformers is 4.57.0, and must be >=5.0" in checks(done)["versions"]["message"]
        assert "pip install 'transformers>=5.0'" in checks(done)["versions"]["next_step"]

    def test_a_package_that_claims_the_scheme_must_go(
        self, run: Run, gated: tuple[str, ...], packages: Path
    ) -> None:
        rival_package(packages, "safelock+sqlite")
        done = run("doctor", *gated, "--format", "json")
        assert faults(done) == {"registry"}
        assert "rival-store" in checks(done)["registry"]["message"]
        assert checks(done)["schemes"]["status"] == "warning"

    def test_one_that_claims_another_scheme_of_ours_is_told(
        self, run: Run, gated: tuple[str, ...], packages: Path
    ) -> None:
        rival_package(packages, "safelock+mysql")
        done = run("doctor", *gated, "--format", "json")
        assert faults(done) == set()
        assert "rival-store (safelock+mysql)" in checks(done)["schemes"]["message"]


class TestSettings:
    def test_are_all_shown_with_their_origin_and_no_secret(
        self, run: Run, gated: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = write_keys(tmp_path)
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(keys.private))
        monkeypatch.setenv("SAFELOCK_PUBLIC_KEYS", str(keys.public))
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY_PASSWORD", "hunter2")
        done = run("doctor", *gated, "--format", "json")
        assert faults(done) == {"keys"}, "the key is not encrypted"
        settings = {one["variable"]: one for one in checks(done)["settings"]["facts"]["settings"]}
        assert settings["SAFELOCK_SIGNING_KEY"]["value"] == str(keys.private)
        assert settings["SAFELOCK_SIGNING_KEY"]["origin"] == "environment"
        assert settings["SAFELOCK_SIGNING_KEY_PASSWORD"]["value"] == "********"
        assert settings["SAFELOCK_AUTH"] == {
            "variable": "SAFELOCK_AUTH",
            "value": "none",
            "origin": "default",
        }
        table = run("doctor", *gated)
        assert "hunter2" not in done.stdout + done.stderr + table.stdout + table.stderr
        monkeypatch.delenv("SAFELOCK_SIGNING_KEY_PASSWORD")
        assert faults(run("doctor", *gated, "--format", "json")) == set()

    def test_a_misspelt_one_and_a_failpoint_are_told(
        self, run: Run, gated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAFELOCK_POLCY", "safelock.yaml")
        monkeypatch.setenv("SAFELOCK_FAILPOINT", "nowhere")
        done = run("doctor", *gated, "--format", "json")
        assert faults(done) == set()
        found = checks(done)["settings"]
        assert found["status"] == "warning"
        assert "SAFELOCK_POLCY is no setting" in found["message"]
        assert "Is SAFELOCK_POLICY meant?" in found["next_step"]
        assert "is killed" in found["message"]

    def test_one_with_a_value_that_cannot_be_must_be_fixed(
        self, run: Run, gated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAFELOCK_AUTH", "kerberos")
        done = run("doctor", *gated, "--format", "json")
        assert "settings" in faults(done)
        assert "SAFELOCK_AUTH" in checks(done)["settings"]["message"]

    def test_a_signing_key_that_readers_here_do_not_take_must_be_fixed(
        self, run: Run, gated: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(write_keys(tmp_path, name="one").private))
        monkeypatch.setenv("SAFELOCK_PUBLIC_KEYS", str(write_keys(tmp_path, name="other").public))
        done = run("doctor", *gated, "--format", "json")
        assert faults(done) == {"keys"}
        assert "SAFELOCK_PUBLIC_KEYS" in checks(done)["keys"]["next_step"]

    def test_an_identity_that_signs_is_told_and_what_it_takes_is_looked_at(
        self,
        run: Run,
        gated: tuple[str, ...],
        sigstore: SigstoreInstance,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SAFELOCK_SIGSTORE_SIGNING", "true")
        identity = {"identity": "gate@example.org", "issuer": ISSUER}
        monkeypatch.setenv("SAFELOCK_IDENTITIES", json.dumps([identity]))
        done = run("doctor", *gated, "--format", "json")
        found = checks(done)["keys"]
        assert (found["status"], faults(done)) == ("ok", set())
        assert found["facts"] == {
            "signs_with": "an identity",
            "accepts": [f"gate@example.org of {ISSUER}"],
        }
        assert (sigstore.certificates, sigstore.entries) == (0, []), "nobody is asked"
        monkeypatch.delenv("SAFELOCK_IDENTITIES")
        monkeypatch.setenv("SAFELOCK_PUBLIC_KEYS", str(write_keys(tmp_path).public))
        assert "SAFELOCK_IDENTITIES" in checks(run("doctor", *gated, "--format", "json"))["keys"]["next_step"]
        monkeypatch.delenv("SAFELOCK_PUBLIC_KEYS")
        sigstore.trust_config.write_text("{}")
        done = run("doctor", *gated, "--format", "json")
        assert "keys" in faults(done)
        assert "trust configuration" in checks(done)["keys"]["message"]

    def test_a_policy_with_identities_needs_what_verifies_them(
        self,
        run: Run,
        gated: tuple[str, ...],
        sigstore: SigstoreInstance,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        rule = {"identities": [{"identity": "safety@example.org", "issuer": ISSUER}]}
        (tmp_path / "safelock.yaml").write_text(json.dumps({"version": 1, "gates": [{"signature": rule}]}))
        monkeypatch.setenv("SAFELOCK_POLICY", str(tmp_path / "safelock.yaml"))
        assert faults(run("doctor", *gated, "--format", "json")) == set()
        sigstore.trust_config.write_text("{}")
        done = run("doctor", *gated, "--format", "json")
        assert "policy" in faults(done)
        assert "cannot be verified" in checks(done)["policy"]["message"]
        assert "SAFELOCK_SIGSTORE_TRUST_CONFIG" in checks(done)["policy"]["next_step"]

    def test_authentication_without_its_key_must_be_fixed(
        self, run: Run, gated: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAFELOCK_AUTH", "basic-auth")
        monkeypatch.delenv("MLFLOW_FLASK_SERVER_SECRET_KEY", raising=False)
        done = run("doctor", *gated, "--format", "json")
        assert faults(done) == {"authentication"}
        monkeypatch.setenv("MLFLOW_FLASK_SERVER_SECRET_KEY", "static-for-all-workers")
        done = run("doctor", *gated, "--format", "json")
        assert (faults(done), checks(done)["authentication"]["status"]) == (set(), "warning")
        monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "hunter2-and-more")
        done = run("doctor", *gated, "--format", "json")
        assert checks(done)["authentication"]["status"] == "ok"
        assert "hunter2" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def skewable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry on PostgreSQL, with schemas in which the time is another."""
    from mlflow import MlflowClient

    with ExitStack() as until_done:
        uri = until_done.enter_context(postgresql(tmp_path_factory.mktemp("clocks") / "database"))
        MlflowClient(f"{uri}", f"safelock+{uri}").search_registered_models()
        engine = sa.create_engine(uri)
        with engine.begin() as connection:
            for seconds in (10, 300):
                connection.execute(sa.text(f"CREATE SCHEMA later_{seconds}"))
                connection.execute(
                    sa.text(
                        f"CREATE FUNCTION later_{seconds}.clock_timestamp() RETURNS timestamptz "
                        "LANGUAGE sql AS $$ SELECT pg_catalog.clock_timestamp() + "
                        f"interval '{seconds} seconds' $$"
                    )
                )
        engine.dispose()
        yield uri


@pytest.mark.parametrize(
    ("schema", "status"), [("pg_catalog", "ok"), ("later_10", "warning"), ("later_300", "fault")]
)
def test_a_database_whose_clock_differs_is_told(run: Run, skewable: str, schema: str, status: str) -> None:
    uri = f"{skewable}&options=-csearch_path%3D{schema},pg_catalog,public"
    done = run("doctor", "--registry-uri", f"safelock+{uri}", "--tracking-uri", uri, "--format", "json")
    assert checks(done)["clock"]["status"] == status
    assert faults(done) == ({"clock"} if status == "fault" else set())
    seconds = 0 if schema == "pg_catalog" else int(schema.partition("_")[2])
    assert checks(done)["clock"]["facts"]["seconds"] == pytest.approx(seconds, abs=2)


def test_a_server_is_asked_for_its_own_findings(run: Run, tmp_path: Path) -> None:
    policy = tmp_path / "safelock.yaml"
    policy.write_text("version: 1\ngates: [{}]\n")
    with mlflow_server(
        tmp_path / "server",
        arguments=("--app-name", "safelock"),
        environment={"SAFELOCK_POLICY": str(policy)},
    ) as server:
        done = run("doctor", "--tracking-uri", server.url, "--format", "json")
        assert faults(done) == set()
        found = checks(done)
        assert {name for name in found if name.startswith("server: ")} == {
            f"server: {name}" for name in ("registry", "policy", "database", "ledger", "artifacts")
        }
        assert found["server: registry"]["facts"] == {"store": "SafelockStore"}
        assert found["clock"]["status"] == "ok"
        assert not {"policy", "database", "artifacts"} & found.keys(), "those here are not the server's"
        policy.write_text("version: 2\n")
        assert faults(run("doctor", "--tracking-uri", server.url, "--format", "json")) == {"server: policy"}


@contextmanager
def answering(status: int, body: bytes = b"", date: str | None = None) -> Iterator[str]:
    """A server that gives one answer, whatever it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            self.send_header("Date", date or self.date_time_string())
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


OTHERS = json.dumps({"checks": [{"check": "registry", "status": "ok", "message": "\x1b[2J"}]}).encode()


@pytest.mark.parametrize(
    ("status", "body", "date", "check", "said"),
    [
        (404, b"Not Found", None, "server", "--app-name safelock"),
        (200, b'{"checks": [{"check": 1}]}', None, "server", "--app-name safelock"),
        (200, b"[]", None, "server", "--app-name safelock"),
        (401, b"", None, "server", "MLFLOW_TRACKING_USERNAME"),
        (200, OTHERS, "Thu, 01 Jan 2015 00:00:00 GMT", "clock", "NTP"),
    ],
)
def test_a_server_that_does_not_say_that_it_is_gated_must_be_fixed(
    run: Run, status: int, body: bytes, date: str | None, check: str, said: str
) -> None:
    with answering(status, body, date) as url:
        done = run("doctor", "--tracking-uri", url, "--format", "json")
        assert faults(done) == {check}
        assert said in checks(done)[check]["next_step"]
        assert "\x1b" not in run("doctor", "--tracking-uri", url).stdout


def test_a_server_that_is_not_there_must_be_fixed(run: Run) -> None:
    with answering(200) as url:
        pass
    done = run("doctor", "--tracking-uri", url, "--format", "json")
    assert faults(done) == {"server"}
