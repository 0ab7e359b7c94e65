"""Keys and certificates that change while the server runs."""

import http.client
import json
import signal
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import trustme

from server.keys import fingerprint
from tests.servers import Server, free_port

STREAM = {
    "messages": [{"role": "user", "content": "Hello!"}],
    "stream": True,
    "max_tokens": 400,
    "ignore_eos": True,
}
TRIES = 60.0


def key_file(folder: Path, *names: str, name: str = "keys.toml") -> Path:
    file = folder / name
    file.write_text(
        "".join(f'[keys.{name}]\nsha256 = "{fingerprint(name).hex()}"\n' for name in names)
    )
    return file


def certificate(folder: Path, authority: trustme.CA) -> tuple[Path, Path]:
    issued = authority.issue_cert("127.0.0.1")
    chain, key = folder / "tls.crt", folder / "tls.key"
    key.write_bytes(issued.private_key_pem.bytes())
    chain.write_bytes(issued.cert_chain_pems[0].bytes())
    return chain, key


def shown(port: int, trust: ssl.SSLContext) -> bytes | None:
    """The certificate that a new connection gets."""
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        trust.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        return connection.getpeercert(binary_form=True)


def eventually(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + TRIES
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def status(server: Server, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    address = server.url + "/v1/models"
    return httpx.get(address, headers=headers, verify=server.trust, timeout=60).status_code


def test_keys_and_certificates_are_renewed_under_a_live_stream(tmp_path: Path) -> None:
    authority = trustme.CA()
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    keys = key_file(tmp_path, "alice")
    chain, key = certificate(tmp_path, authority)
    flags = ["--tls-certificate", str(chain), "--tls-key", str(key), "--api-keys-file", str(keys)]
    door = free_port()
    flags += [
        "--admin-port",
        str(door),
        "--admin-key-file",
        str(key_file(tmp_path, "ops", name="admin.toml")),
    ]
    flags += ["--admin-host", "0.0.0.0"]  # not loopback, so the certificate is needed
    environment = {"INTERNVL_API_KEY": "from-the-environment"}
    server = Server(tmp_path / "log.txt", flags, environment=environment, trust=trust)
    try:
        renew(server, door, tmp_path, authority, trust)
        assert status(server, "from-the-environment") == 200
        children = server.children("engine") + server.children("preprocessing.worker")
        assert len(children) > 1
        for child in children:
            assert b"from-the-environment" not in Path(f"/proc/{child}/environ").read_bytes()
    finally:
        server.close()
    log = server.log.read_text()
    assert server.process.returncode == 0
    assert "key=alice" in log
    for secret in ("Bearer alice", "from-the-environment", fingerprint("alice").hex()):
        assert secret not in log


def operate(server: Server, door: int, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    address = f"https://127.0.0.1:{door}/state"
    return httpx.get(address, headers=headers, verify=server.trust, timeout=60).status_code


def renew(
    server: Server, door: int, folder: Path, authority: trustme.CA, trust: ssl.SSLContext
) -> None:
    first = shown(server.port, trust)
    assert shown(door, trust) == first
    assert [operate(server, door, key) for key in ("ops", "alice", "x")] == [200, 401, 401]
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{door}/state", headers={"Authorization": "Bearer ops"})
    live = http.client.HTTPSConnection("127.0.0.1", server.port, context=trust, timeout=60)
    headers = {"Authorization": "Bearer alice", "Content-Type": "application/json"}
    live.request("POST", "/v1/chat/completions", json.dumps(STREAM), headers)
    stream = live.getresponse()
    assert stream.status == 200
    begun = stream.readline()
    assert begun.startswith(b"data: ")

    # What cannot be used changes nothing.
    (folder / "tls.key").write_text("no key")
    (folder / "keys.toml").write_text("[keys.bob]")
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: server.log.read_text().count("stays in force") >= 2, "it says nothing")
    assert shown(server.port, trust) == shown(door, trust) == first
    assert status(server, "alice") == 200

    certificate(folder, authority)  # no signal: files are watched
    key_file(folder, "bob")
    key_file(folder, "chief", name="admin.toml")
    eventually(lambda: shown(server.port, trust) != first, "the certificate stays")
    assert shown(door, trust) == shown(server.port, trust)
    eventually(lambda: operate(server, door, "chief") == 200, "the operator's key is unknown")
    assert operate(server, door, "ops") == 401
    eventually(lambda: status(server, "bob") == 200, "the new key is unknown")
    assert status(server, "alice") == 401

    # The stream, begun with what is gone now, ends as if nothing had been.
    rest = begun + stream.read()
    assert rest.rstrip().endswith(b"data: [DONE]")
    assert rest.count(b"data: ") > 100
    assert live.sock is not None
    assert live.sock.getpeercert(binary_form=True) == first  # type: ignore[attr-defined]
    live.request("GET", "/v1/models", headers=headers)
    assert live.getresponse().status == 401
    live.close()
