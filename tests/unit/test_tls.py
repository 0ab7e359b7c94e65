"""The certificate: what cannot be used is said without a path, and changes nothing."""

import contextlib
import os
import pty
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import trustme

from server import cli
from server.app import create_app
from server.run import _Operators
from server.tls import Certificate
from tests import small_tokenizer
from tests.fake_engine import FakeEngine, FakeMedia
from tests.servers import free_port
from wire.settings import EngineSettings, ServerSettings, SettingError, Settings


@pytest.fixture(autouse=True)
def own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is told to start would take the tests' log over."""
    monkeypatch.setattr("wire.logs.setup", lambda *_: None)


def write(folder: Path, *, key_of: trustme.LeafCert | None = None) -> trustme.LeafCert:
    issued = trustme.CA().issue_cert("server.example")
    issued.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    (key_of or issued).private_key_pem.write_to_path(folder / "tls.key")
    return issued


def shown(certificate: Certificate) -> bytes | None:
    """What a client is shown, in a handshake without a socket."""
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trust.wrap_bio(back, there)
    server = certificate.context.wrap_bio(there, back, server_side=True)
    for side in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return client.getpeercert(binary_form=True)


def test_a_pair_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first = write(tmp_path)
    certificate = Certificate(tmp_path / "tls.crt", tmp_path / "tls.key")
    assert certificate.context.minimum_version >= ssl.TLSVersion.TLSv1_2
    before = shown(certificate)
    assert before
    write(tmp_path, key_of=first)
    for content in (None, "nothing", ""):
        if content is not None:
            (tmp_path / "tls.key").write_text(content)
        with pytest.raises(SettingError, match=r"its key: [a-z]") as refused:
            certificate.load()
        assert str(tmp_path) not in str(refused.value)
        assert shown(certificate) == before
    (tmp_path / "tls.key").unlink()
    with pytest.raises(SettingError, match="No such file"):
        certificate.load()
    write(tmp_path)
    certificate.load()
    assert shown(certificate) not in (None, before)


def test_an_encrypted_key_is_refused_and_asks_nobody(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    issued = write(tmp_path)
    key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    form = PrivateFormat.PKCS8
    locked = key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"secret"))
    (tmp_path / "tls.key").write_bytes(locked)
    with pytest.raises(SettingError):
        Certificate(tmp_path / "tls.crt", tmp_path / "tls.key")
    # With a terminal to ask on, nobody at it.
    master, slave = pty.openpty()
    code = (
        "import os, sys; from pathlib import Path; from server.tls import Certificate\n"
        "os.open(os.ttyname(0), os.O_RDWR)\n"  # becomes the session's terminal
        "Certificate(Path(sys.argv[1], 'tls.crt'), Path(sys.argv[1], 'tls.key'))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdin=slave,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            start_new_session=True,
            check=False,
        )
    finally:
        os.close(master)
        os.close(slave)
    assert "SettingError" in done.stderr


def test_one_file_may_hold_both_and_a_key_alone_is_none(tmp_path: Path) -> None:
    issued = write(tmp_path)
    file = tmp_path / "both.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(file)
    assert Certificate.of(ServerSettings(tls_certificate=str(file))) is not None
    assert Certificate.of(ServerSettings()) is None
    with pytest.raises(SettingError):
        Certificate.of(ServerSettings(tls_key=str(file)))


def test_a_server_does_not_start_with_a_certificate_it_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--tls-certificate", str(tmp_path / "none")]) == cli.EXIT_USAGE
    assert "TLS certificate" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "encrypted"), [("127.0.0.1", False), ("0.0.0.0", True)])
async def test_operators_have_the_certificate_but_where_nobody_else_listens(
    tmp_path: Path, host: str, encrypted: bool
) -> None:
    write(tmp_path)
    (tmp_path / "admin.toml").write_text(f'[keys.ops]\nsha256 = "{"0" * 64}"')
    settings = ServerSettings(
        admin_port=free_port(), admin_host=host, admin_key_file=str(tmp_path / "admin.toml")
    )
    engine = EngineSettings(model=str(small_tokenizer.save(tmp_path / "tiny")))
    app = create_app(Settings(settings, engine=engine), FakeEngine(), FakeMedia())
    certificate = Certificate(tmp_path / "tls.crt", tmp_path / "tls.key")
    operators = _Operators(app.state.service, settings, certificate)
    try:
        expected = certificate.context if encrypted else None
        assert getattr(operators._server.config, "ssl", None) is expected
    finally:
        await operators.stop()
