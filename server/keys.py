"""Who may ask: the API keys of the settings and of a file, each with a name.

The file is TOML, like the server's settings: it has comments, and an entry can be appended to it.
It holds hashes. A key has 256 random bits, so that a plain SHA-256 of it cannot be guessed back.

    [keys.search-team]
    sha256 = "…"                    # or a list, while a new key takes the place of an old one
    requests_per_minute = 600       # limits are optional; see server.limits
    tokens_per_minute = 200_000
    visual_tokens_per_minute = 100_000
    max_concurrent_requests = 16
    priority = 0                    # the best that its requests may ask for
    weight = 1.0                    # its part under the fair policy

Neither a key nor anything of the file that might be one is ever logged.
"""

import hashlib
import hmac
import logging
import math
import re
import secrets
import time
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from server.auth import Tenant
from server.limits import Account, Clock, KeyLimits
from wire.settings import ServerSettings, SettingError

logger = logging.getLogger(__name__)

# Names are labels of metrics, and every key is compared with.
MAX_KEYS = 1000
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HASH = re.compile(r"[0-9a-f]{64}")

_Limit = Annotated[int, Meta(ge=1, le=2**53)]


class Entry(KeyLimits, frozen=True, kw_only=True):
    """A key of the file."""

    sha256: str | list[str]
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    visual_tokens_per_minute: _Limit | None = None
    max_concurrent_requests: _Limit | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    weight: Annotated[float, Meta(gt=0)] = 1.0

    @property
    def hashes(self) -> list[str]:
        """In lower case."""
        given = [self.sha256] if isinstance(self.sha256, str) else self.sha256
        return [text.strip().lower() for text in given]

    @property
    def limits(self) -> KeyLimits:
        """Without the rest."""
        return msgspec.convert(self, KeyLimits, from_attributes=True)


def read_keys(file: Path) -> dict[str, Entry]:
    """The entries by name. Raises SettingError, which says what is wrong and repeats none of it."""
    try:
        page = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"the file of keys cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingError("the file of keys is not UTF-8") from None
    except (ValueError, RecursionError) as error:  # not all that it cannot read has its own error
        place = re.search(r"\(at [a-z0-9, ]+\)$", str(error))
        where = f" {place[0]}" if place else ""
        raise SettingError(f"the file of keys is not TOML{where}") from None
    tables = page.get("keys")
    if set(page) != {"keys"} or not isinstance(tables, dict) or not tables:
        # None at all is no way to say that nobody may ask: an editor may have emptied the file.
        raise SettingError(
            "the file of keys must hold tables [keys.NAME], at least one, and nothing else"
        )
    if len(tables) > MAX_KEYS:
        raise SettingError(f"the file of keys has more than {MAX_KEYS}")
    entries: dict[str, Entry] = {}
    for number, (name, table) in enumerate(tables.items(), 1):
        if not NAME.fullmatch(name):
            raise SettingError(f"the name of key {number} must have 1 to 64 of A-Z a-z 0-9 _ -")
        entries[name] = _entry(name, table)
    seen: set[str] = set()
    for name, entry in entries.items():
        if not seen.isdisjoint(entry.hashes):
            raise SettingError(f"[keys.{name}] has the same key as another one")
        seen |= set(entry.hashes)
    return entries


def _entry(name: str, table: object) -> Entry:
    known = Entry.__struct_fields__
    if not isinstance(table, dict) or not set(table) <= set(known):
        raise SettingError(f"[keys.{name}] must be a table of no more than {', '.join(known)}")
    try:
        entry = msgspec.convert(table, Entry)
    except msgspec.ValidationError as error:  # it names fields and types, no values
        raise SettingError(f"[keys.{name}]: {error}") from None
    if not entry.hashes or not all(_HASH.fullmatch(text) for text in entry.hashes):
        raise SettingError(
            f"[keys.{name}]: sha256 must be 64 hexadecimal digits, as `internvl key` prints them"
        )
    if not math.isfinite(entry.weight):
        raise SettingError(f"[keys.{name}]: weight must be a finite number")
    return entry


def new_key(name: str) -> tuple[str, str]:
    """A fresh key, and its entry for the file. Raises SettingError for a name that is none."""
    if not NAME.fullmatch(name):
        raise SettingError("a name must have 1 to 64 of A-Z a-z 0-9 _ -")
    key = f"sk-{secrets.token_urlsafe(32)}"
    return key, f'[keys.{name}]\nsha256 = "{fingerprint(key).hex()}"\n'


def fingerprint(key: str) -> bytes:
    """32 bytes that say which key it is, and not what it is."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Keys:
    """The keys in force. Without any configured, everybody may ask."""

    def __init__(
        self,
        file: str,
        keys: tuple[str, ...] = (),
        weights: tuple[float, ...] = (),
        *,
        salted: bool = True,
        clock: Clock = time.monotonic,
    ) -> None:
        """Raises SettingError where ``file`` cannot be used."""
        self.file = Path(file).expanduser() if file else None
        self._salted = salted
        self._clock = clock
        self._given = [(f"api-key-{number}", key) for number, key in enumerate(keys, 1)]
        self._weights = weights or (1.0,) * len(keys)
        self.accounts: dict[str, Account] = {}
        self._tenants: list[tuple[bytes, Tenant]] = []
        self.load()

    @classmethod
    def of(cls, settings: ServerSettings, clock: Clock = time.monotonic) -> "Keys":
        """Those of the API. Raises SettingError."""
        return cls(
            settings.api_keys_file,
            settings.api_key,
            settings.api_key_weights,
            salted=settings.cache_per_key,
            clock=clock,
        )

    @classmethod
    def of_operators(cls, settings: ServerSettings) -> "Keys":
        """Those of the operators' port. Raises SettingError."""
        if not settings.admin_key_file:
            raise SettingError("admin_port needs admin_key_file")
        return cls(settings.admin_key_file)

    @property
    def needed(self) -> bool:
        """Whether a request needs one."""
        return bool(self._given) or self.file is not None

    def find(self, key: str) -> Tenant | None:
        """Whose key it is. Takes the same time for every wrong one."""
        given = fingerprint(key)
        matches = [hmac.compare_digest(given, known) for known, _ in self._tenants]
        return self._tenants[matches.index(True)][1] if any(matches) else None

    def load(self) -> None:
        """Read the file. One that cannot be used changes nothing; raises SettingError."""
        entries = read_keys(self.file) if self.file is not None else {}
        for name, _ in self._given:
            if name in entries:
                raise SettingError(f"[keys.{name}]: the name is that of one of --api-key")
        tenants, accounts = [], {}
        for (name, key), weight in zip(self._given, self._weights, strict=True):
            account = accounts[name] = self._account(name, KeyLimits())
            identity = fingerprint(key)
            tenants.append((identity, self._tenant(identity, account, weight)))
        for name, entry in entries.items():
            account = accounts[name] = self._account(name, entry.limits)
            # The same for all keys of a name: who gets a new one still finds what was cached.
            identity = fingerprint(f"name {name}")
            tenant = self._tenant(identity, account, entry.weight, entry.priority)
            tenants += [(bytes.fromhex(text), tenant) for text in entry.hashes]
        self._tenants, self.accounts = tenants, accounts
        logger.debug("API keys: %s", ", ".join(accounts))

    def _account(self, name: str, limits: KeyLimits) -> Account:
        account = self.accounts.get(name) or Account(name, clock=self._clock)
        account.limit(limits)
        return account

    def _tenant(
        self, identity: bytes, account: Account, weight: float, priority: int | None = None
    ) -> Tenant:
        salt = identity if self._salted else b""
        return Tenant(identity, weight, salt, priority, account)
