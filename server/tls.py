"""The certificate that connections are encrypted with. It can be renewed while the server runs: new
connections get the new one, and those that are open go on."""

import ssl
from pathlib import Path

from wire.settings import ServerSettings, SettingError


class Certificate:
    """Two files of PEM: a chain of certificates, and its key, which may stand in the same file."""

    def __init__(self, chain: Path, key: Path | None) -> None:
        """Raises SettingError where they cannot be used."""
        self.chain = chain
        self.key = key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load()

    @classmethod
    def of(cls, settings: ServerSettings) -> "Certificate | None":
        """That of the settings, if they have one. Raises SettingError."""
        if not settings.tls_certificate:
            if settings.tls_key:
                raise SettingError("--tls-key needs --tls-certificate")
            return None
        key = Path(settings.tls_key).expanduser() if settings.tls_key else None
        return cls(Path(settings.tls_certificate).expanduser(), key)

    @property
    def files(self) -> list[Path]:
        """To be watched."""
        return [self.chain] if self.key is None else [self.chain, self.key]

    def load(self) -> None:
        """Read them, again. Raises SettingError, and changes nothing, where they cannot be used:
        while they are being renewed they may not fit each other."""
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for context in (trial, self.context):
            try:
                # No password: OpenSSL would ask for one on the terminal.
                context.load_cert_chain(self.chain, self.key, password="")
            except ssl.SSLError as error:
                reason = (error.reason or "unknown").replace("_", " ").lower()
                raise SettingError(f"the TLS certificate or its key: {reason}") from None
            except OSError as error:
                raise SettingError(f"the TLS certificate or its key: {error.strerror}") from None
