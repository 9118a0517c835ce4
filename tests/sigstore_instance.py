"""A Sigstore instance of our own, for tests: a certificate authority, its CT log and a transparency log.

It answers over HTTP what Fulcio (``/api/v2/signingCert``) and Rekor (``/api/v1/log/entries``) answer, with
certificates, signed timestamps and inclusion proofs that the real client verifies against the instance's
trust root; nothing of the client is replaced. Sources: RFC 6962 (both logs), Fulcio's list of extensions,
Rekor's ``dsse`` entries of version 0.0.1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import rfc8785
from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER = "https://accounts.example.org"
"""The OpenID Connect provider that the instance believes."""

ISSUER_V1, ISSUER_V2 = "1.3.6.1.4.1.57264.1.1", "1.3.6.1.4.1.57264.1.8"
SCT_LIST = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")


class SigstoreInstance:
    """What a running instance knows.

    Attributes:
        url: Where it answers.
        trust_config: File that describes it to clients.
        token_file: File with the identity token of who is logged in.
        entries: What was put into the transparency log, in canonical form.
        certificates: How many certificates were issued.
        clock: How many seconds the log's clock is fast.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.trust_config, self.token_file = folder / "sigstore.json", folder / "token"
        self.entries: list[bytes] = []
        self.certificates, self.clock = 0, 0
        self._may_answer = threading.Event()
        self._may_answer.set()
        self._provider, self._authority, self._ct_log, self._log = (_new_key() for _ in range(4))
        self._root = self._self_signed()
        self.trust_config.write_text(self._description())

    def log_in(self, identity: str, issuer: str = ISSUER, *, age: int = 0) -> None:
        """Have an identity token of the provider, valid for ten minutes, made ``age`` seconds ago."""
        made = int(time.time()) - age
        claims = {"iss": issuer, "sub": identity, "aud": "sigstore", "iat": made, "exp": made + 600}
        self.token_file.write_text(jwt.encode(claims, self._provider, algorithm="ES256"))

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Take requests, and answer none until this is over, or for five seconds."""
        self._may_answer.clear()
        try:
            yield
        finally:
            self._may_answer.set()

    def wait(self) -> None:
        """Wait while nothing is answered."""
        self._may_answer.wait(5)

    def _description(self) -> str:
        """The instance's ``ClientTrustConfig``, as JSON."""
        since = {"start": "2020-01-01T00:00:00Z"}
        service = {"url": self.url, "majorApiVersion": 1, "validFor": since, "operator": "tests"}
        certificate = {"rawBytes": _text(self._root.public_bytes(Encoding.DER))}
        authority = {
            "subject": {"organization": "tests", "commonName": "tests"},
            "uri": self.url,
            "certChain": {"certificates": [certificate]},
            "validFor": since,
        }
        kind = "application/vnd.dev.sigstore"
        return json.dumps(
            {
                "mediaType": f"{kind}.clienttrustconfig.v0.1+json",
                "trustedRoot": {
                    "mediaType": f"{kind}.trustedroot+json;version=0.1",
                    "tlogs": [self._described(self._log)],
                    "certificateAuthorities": [authority],
                    "ctlogs": [self._described(self._ct_log)],
                },
                "signingConfig": {
                    "mediaType": f"{kind}.signingconfig.v0.2+json",
                    "caUrls": [service],
                    "rekorTlogUrls": [service],
                    "rekorTlogConfig": {"selector": "ANY"},
                },
            }
        )

    def _described(self, log: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
        key = {
            "rawBytes": _text(_der(log)),
            "keyDetails": "PKIX_ECDSA_P256_SHA_256",
            "validFor": {"start": "2020-01-01T00:00:00Z"},
        }
        return {
            "baseUrl": self.url,
            "hashAlgorithm": "SHA2_256",
            "publicKey": key,
            "logId": {"keyId": _text(_id_of(log))},
        }

    # The certificate authority, and its CT log

    def _self_signed(self) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
        own = x509.SubjectKeyIdentifier.from_public_key(self._authority.public_key())
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder(name, name, self._authority.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True), critical=True)
            .add_extension(own, critical=False)
            .sign(self._authority, SHA256())
        )

    def issue(self, token: str, request: bytes) -> list[str]:
        """A certificate for whoever the token is of, and the authority's own, in PEM.

        Raises:
            jwt.InvalidTokenError: The token is none of the provider's, or has expired.
        """
        claims = jwt.decode(token, self._provider.public_key(), algorithms=["ES256"], audience="sigstore")
        key = x509.load_pem_x509_csr(request).public_key()
        name = x509.UniformResourceIdentifier if "://" in claims["sub"] else x509.RFC822Name
        now = datetime.now(UTC)
        issuer = claims["iss"]
        extensions = (
            (_usage(digital_signature=True), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False),
            (x509.SubjectKeyIdentifier.from_public_key(key), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self._authority.public_key()), False),
            (x509.SubjectAlternativeName([name(claims["sub"])]), True),
            (x509.UnrecognizedExtension(x509.ObjectIdentifier(ISSUER_V1), issuer.encode()), False),
            (x509.UnrecognizedExtension(x509.ObjectIdentifier(ISSUER_V2), asn1.encode_der(issuer)), False),
        )
        builder = x509.CertificateBuilder(self._root.subject, x509.Name([]), key, x509.random_serial_number())
        builder = builder.not_valid_before(now).not_valid_after(now + timedelta(minutes=10))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        timestamp = self._timestamp(builder.sign(self._authority, SHA256()).tbs_certificate_bytes)
        listed = struct.pack(f"!HH{len(timestamp)}s", len(timestamp) + 2, len(timestamp), timestamp)
        builder = builder.add_extension(
            x509.UnrecognizedExtension(SCT_LIST, asn1.encode_der(listed)), critical=False
        )
        self.certificates += 1
        chain = (builder.sign(self._authority, SHA256()), self._root)
        return [certificate.public_bytes(Encoding.PEM).decode() for certificate in chain]

    def _timestamp(self, certificate: bytes) -> bytes:
        """The CT log's signed timestamp of a certificate before it has one (RFC 6962, 3.2)."""
        now = time.time_ns() // 1_000_000
        length = len(certificate).to_bytes(3, "big")
        signed = struct.pack("!BBQH", 0, 0, now, 1) + _id_of(self._authority) + length + certificate + b"\0\0"
        signature = self._ct_log.sign(signed, ec.ECDSA(SHA256()))
        head = struct.pack("!B32sQH", 0, _id_of(self._ct_log), now, 0)
        return head + struct.pack(f"!BBH{len(signature)}s", 4, 3, len(signature), signature)

    # The transparency log

    def put(self, proposed: dict[str, Any]) -> dict[str, Any]:
        """Put an envelope into the log; its entry, with the promise and the proof that it is in there.

        Raises:
            InvalidSignature: The certificate's key did not sign it.
        """
        content = proposed["spec"]["proposedContent"]
        envelope, verifier = json.loads(content["envelope"]), content["verifiers"][0]
        payload = base64.b64decode(envelope["payload"])
        kind = envelope["payloadType"].encode()
        signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
        signature = envelope["signatures"][0]["sig"]
        certificate = x509.load_pem_x509_certificate(base64.b64decode(verifier))
        certificate.public_key().verify(base64.b64decode(signature), signed, ec.ECDSA(SHA256()))
        body = {
            "apiVersion": "0.0.1",
            "kind": "dsse",
            "spec": {
                "envelopeHash": _digest(content["envelope"].encode()),
                "payloadHash": _digest(payload),
                "signatures": [{"signature": signature, "verifier": verifier}],
            },
        }
        self.entries.append(rfc8785.dumps(body))
        return self._entry(len(self.entries) - 1)

    def _entry(self, index: int) -> dict[str, Any]:
        size = len(self.entries)
        root, path = _root_of(self.entries), _path_to(index, self.entries)
        note = f"log.example.org\n{size}\n{_text(root)}\n"
        promised = {
            "body": _text(self.entries[index]),
            "integratedTime": int(time.time()) + self.clock,
            "logID": _id_of(self._log).hex(),
            "logIndex": index,
        }
        signature = _id_of(self._log)[:4] + self._log.sign(note.encode(), ec.ECDSA(SHA256()))
        proof = {
            "checkpoint": f"{note}\n\u2014 log.example.org {_text(signature)}\n",
            "hashes": [one.hex() for one in path],
            "logIndex": index,
            "rootHash": root.hex(),
            "treeSize": size,
        }
        promise = self._log.sign(rfc8785.dumps(promised), ec.ECDSA(SHA256()))
        verification = {"inclusionProof": proof, "signedEntryTimestamp": _text(promise)}
        return {_leaf(self.entries[index]).hex(): {**promised, "verification": verification}}


@contextmanager
def running_instance(folder: Path) -> Iterator[SigstoreInstance]:
    """An instance that answers on a free port of this machine, with its files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.instance = SigstoreInstance(f"http://127.0.0.1:{server.server_port}", folder)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.instance  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        instance: SigstoreInstance = self.server.instance  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        instance.wait()
        try:
            if self.path == "/api/v2/signingCert":
                token = self.headers["Authorization"].removeprefix("Bearer ")
                chain = instance.issue(token, base64.b64decode(body["certificateSigningRequest"]))
                answer = {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}
            else:
                answer = instance.put(body)
        except jwt.InvalidTokenError as error:
            self._answer(401, {"code": 16, "message": str(error)})
        else:
            self._answer(201, answer)

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_arguments: object) -> None:
        """Nothing on the tests' output."""


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _id_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_der(key)).digest()


def _usage(**used: bool) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: used.get(name, False) for name in names})


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _digest(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def _leaf(entry: bytes) -> bytes:
    return hashlib.sha256(b"\0" + entry).digest()


def _split(entries: list[bytes]) -> int:
    """The largest power of two below the number of entries."""
    return 1 << (len(entries) - 1).bit_length() - 1


def _root_of(entries: list[bytes]) -> bytes:
    """The hash of a tree with these leaves (RFC 6962, 2.1)."""
    if len(entries) == 1:
        return _leaf(entries[0])
    middle = _split(entries)
    return hashlib.sha256(b"\1" + _root_of(entries[:middle]) + _root_of(entries[middle:])).digest()


def _path_to(index: int, entries: list[bytes]) -> list[bytes]:
    """The hashes beside the way from a leaf to the root, from below (RFC 6962, 2.1.1)."""
    if len(entries) == 1:
        return []
    middle = _split(entries)
    if index < middle:
        return [*_path_to(index, entries[:middle]), _root_of(entries[middle:])]
    return [*_path_to(index - middle, entries[middle:]), _root_of(entries[:middle])]
