"""Envelopes are those of the DSSE standard, and nothing in one is believed before its signature holds."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from mlflow_safelock.errors import KeyFileError, VerificationError
from mlflow_safelock.provenance import load_public_key, load_signing_key
from mlflow_safelock.provenance.dsse import IN_TOTO, encode, sign, verify
from mlflow_safelock.provenance.keys import PublicKey
from tests.keys import write_keys

PAYLOAD = b'{"_type":"https://in-toto.io/Statement/v1"}'
KINDS = pytest.mark.parametrize("kind", ["ed25519", "p256"])


def test_the_encoding_and_the_signature_of_the_standards_own_example_hold() -> None:
    encoded = encode("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    numbers = ec.EllipticCurvePublicNumbers(
        46950820868899156662930047687818585632848591499744589407958293238635476079160,
        5640078356564379163099075877009565129882514886557779369047442380624545832820,
        ec.SECP256R1(),
    )
    pem = numbers.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    # The example writes the signature's two numbers one after the other.
    raw = base64.b64decode(
        "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="
    )
    signature = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    assert PublicKey.parse(pem, origin="It").made(signature, encoded)


@KINDS
def test_what_a_key_signed_is_verified_by_its_public_key_alone(tmp_path: Path, kind: str) -> None:
    key, other = write_keys(tmp_path, kind), write_keys(tmp_path, kind, "other")
    envelope = sign(PAYLOAD, load_signing_key(key.private))
    wanted, another = load_public_key(key.public), load_public_key(other.public)
    assert verify(envelope, [another, wanted], origin="It") == (PAYLOAD, wanted)
    with pytest.raises(VerificationError, match="signed by none of the keys"):
        verify(envelope, [another], origin="It")
    with pytest.raises(VerificationError, match="signed by none"):
        verify(envelope, [], origin="It")


@KINDS
def test_whatever_is_changed_no_longer_holds(tmp_path: Path, kind: str) -> None:
    key = write_keys(tmp_path, kind)
    public = load_public_key(key.public)
    sound = json.loads(sign(PAYLOAD, load_signing_key(key.private)))
    signature = bytearray(base64.b64decode(sound["signatures"][0]["sig"]))
    signature[-1] ^= 1
    changed = [
        {**sound, "payload": base64.b64encode(PAYLOAD + b" ").decode()},
        {**sound, "payloadType": "application/json"},
        {**sound, "signatures": [{"sig": base64.b64encode(bytes(signature)).decode()}]},
        {**sound, "signatures": []},
        {**sound, "signatures": [{"sig": "", "keyid": public.keyid}]},
        {**sound, "payload": "not base64!"},
        {"payload": sound["payload"], "payloadType": IN_TOTO},
        [],
    ]
    for envelope in changed:
        with pytest.raises(VerificationError):
            verify(json.dumps(envelope).encode(), [public], origin="It")
    for data in (b"", b"null", b"{", b"\xff"):
        with pytest.raises(VerificationError, match="no DSSE envelope"):
            verify(data, [public], origin="It")


def test_what_the_envelope_says_of_its_key_is_not_believed(tmp_path: Path) -> None:
    key, other = write_keys(tmp_path), write_keys(tmp_path, name="other")
    envelope = json.loads(sign(PAYLOAD, load_signing_key(other.private)))
    envelope["signatures"][0]["keyid"] = load_public_key(key.public).keyid
    with pytest.raises(VerificationError, match="signed by none"):
        verify(json.dumps(envelope).encode(), [load_public_key(key.public)], origin="It")


def test_a_further_signature_of_somebody_else_does_not_matter(tmp_path: Path) -> None:
    key, other = write_keys(tmp_path), write_keys(tmp_path, "p256", "other")
    mine, theirs = (json.loads(sign(PAYLOAD, load_signing_key(pair.private))) for pair in (key, other))
    both = {**mine, "signatures": [*theirs["signatures"], *mine["signatures"]]}
    assert verify(json.dumps(both).encode(), [load_public_key(key.public)], origin="It")[0] == PAYLOAD


@given(st.text(max_size=20), st.binary(max_size=20), st.text(max_size=20), st.binary(max_size=20))
def test_no_two_payloads_are_encoded_alike(kind: str, payload: bytes, kind2: str, payload2: bytes) -> None:
    assert (encode(kind, payload) == encode(kind2, payload2)) is ((kind, payload) == (kind2, payload2))


def test_a_key_is_known_by_the_digest_that_openssl_gives_its_der_form(tmp_path: Path) -> None:
    key = write_keys(tmp_path)
    command = ["openssl", "pkey", "-pubin", "-in", key.public, "-outform", "DER"]
    try:
        der = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("openssl is not installed here")
    done = subprocess.run(["openssl", "dgst", "-sha256", "-r"], input=der, capture_output=True, check=True)
    assert load_public_key(key.public).keyid == done.stdout.decode().split()[0]
    assert load_signing_key(key.private).public == load_public_key(key.public)


class TestKeyFiles:
    @pytest.mark.parametrize("kind", ["rsa", "p384"])
    def test_keys_of_other_kinds_are_refused(self, tmp_path: Path, kind: str) -> None:
        key = write_keys(tmp_path, kind)
        for load, path in ((load_signing_key, key.private), (load_public_key, key.public)):
            with pytest.raises(KeyFileError, match=r"another kind.*openssl genpkey"):
                load(path)

    def test_one_is_not_taken_for_the_other(self, tmp_path: Path) -> None:
        key = write_keys(tmp_path)
        with pytest.raises(KeyFileError, match=r"private key, and must be a public one.*-pubout"):
            load_public_key(key.private)
        with pytest.raises(KeyFileError, match="no private key"):
            load_signing_key(key.public)

    def test_an_encrypted_key_needs_its_password(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = write_keys(tmp_path, password=b"pass word")
        with pytest.raises(KeyFileError, match=r"encrypted.*SAFELOCK_SIGNING_KEY_PASSWORD"):
            load_signing_key(key.private)
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY_PASSWORD", "wrong")
        with pytest.raises(KeyFileError):
            load_signing_key(key.private)
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY_PASSWORD", "pass word")
        assert load_signing_key(key.private).public == load_public_key(key.public)

    def test_a_private_key_does_not_show_itself(self, tmp_path: Path) -> None:
        key = load_signing_key(write_keys(tmp_path).private)
        assert repr(key) == f"SigningKey({key.public.keyid})"

    def test_a_file_that_is_none_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "x.pem").write_text("hello")
        for load in (load_signing_key, load_public_key):
            with pytest.raises(KeyFileError, match=r"x\.pem"):
                load(tmp_path / "x.pem")
            with pytest.raises(KeyFileError, match=r"nowhere\.pem cannot be read"):
                load(tmp_path / "nowhere.pem")
