"""The file of keys: what it may hold, what is said of one that cannot be used, and what a reload
changes."""

import logging
import os
import socket
from pathlib import Path

import pytest

from server import cli
from server.keys import MAX_KEYS, Keys, fingerprint, new_key, read_keys
from server.reload import Reloader
from wire.settings import SettingError

KEY = "sk-very-secret-key-of-alice"
HASH = fingerprint(KEY).hex()


@pytest.fixture(autouse=True)
def own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is told to start would take the tests' log over."""
    monkeypatch.setattr("wire.logs.setup", lambda *_: None)


def write(folder: Path, text: str) -> Path:
    file = folder / "keys.toml"
    file.write_text(text, encoding="utf-8")
    return file


def entry(name: str, key: str, more: str = "") -> str:
    return f'[keys.{name}]\nsha256 = "{fingerprint(key).hex()}"\n{more}\n'


def test_a_key_that_the_command_makes_is_known_by_its_entry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["key", "alice"]) == 0
    first = capsys.readouterr()
    assert cli.main(["key", "bob"]) == 0
    second = capsys.readouterr()
    keys = Keys(str(write(tmp_path, first.out + second.out)))
    for name, said in (("alice", first.err), ("bob", second.err)):
        key = said.split()[-1]
        tenant = keys.find(key)
        assert tenant is not None
        assert tenant.account.name == name
        assert key not in first.out + second.out
        assert keys.find(key[:-1]) is None
        assert len(key) > 40
    assert keys.find("") is None
    assert keys.needed
    assert cli.main(["key", "a b"]) == cli.EXIT_USAGE


def test_every_field_reaches_the_tenant(tmp_path: Path) -> None:
    more = """requests_per_minute = 60
        tokens_per_minute = 10_000
        visual_tokens_per_minute = 5000
        max_concurrent_requests = 4
        priority = 5
        weight = 2"""
    keys = Keys(str(write(tmp_path, entry("alice", KEY, more) + entry("bob", "other"))))
    alice, bob = keys.find(KEY), keys.find("other")
    assert alice is not None
    assert bob is not None
    assert (alice.priority, alice.weight) == (5, 2.0)
    assert (bob.priority, bob.weight) == (None, 1.0)
    limits = alice.account.limits
    assert limits.requests_per_minute == 60
    assert limits.tokens_per_minute == 10_000
    assert limits.visual_tokens_per_minute == 5000
    assert limits.max_concurrent_requests == 4
    assert not bob.account.is_limited
    assert len({alice.id, bob.id, alice.salt, bob.salt}) == 2
    assert not hasattr(limits, "sha256")


BROKEN = {
    "a number too long": ("a = " + "1" * 5_000, "is not TOML"),
    "nested too deep": ("a = " + "[" * 100_000, "is not TOML"),
    "no TOML": (f"{KEY} = ", "not TOML (at "),
    "a key twice": (f"a = {{{KEY} = 1, {KEY} = 2}}", "not TOML"),
    "empty": ("", "at least one"),
    "something else": (f'[keys.alice]\nsha256 = "{HASH}"\n[{KEY}]', "nothing else"),
    "no table": (f'keys = "{KEY}"', "must hold tables"),
    "an entry that is none": (f'[keys]\nalice = "{KEY}"', "[keys.alice] must be a table of"),
    "no hash": ("[keys.alice]", "missing required field `sha256`"),
    "a key for a hash": (f'[keys.alice]\nsha256 = "{KEY}"', "64 hexadecimal digits"),
    "no hashes": ("[keys.alice]\nsha256 = []", "64 hexadecimal digits"),
    "a name that is none": (f'[keys."{KEY} "]\nsha256 = "{HASH}"', "the name of key 1"),
    "an unknown field": (f'[keys.alice]\nsha256 = "{HASH}"\n{KEY} = 1', "sha256, priority, weight"),
    "a text for a limit": (
        f'[keys.alice]\nsha256 = "{HASH}"\nrequests_per_minute = "{KEY}"',
        "$.requests_per_minute",
    ),
    "a limit of nothing": (f'[keys.alice]\nsha256 = "{HASH}"\ntokens_per_minute = 0', ">= 1"),
    "a weight of nothing": (f'[keys.alice]\nsha256 = "{HASH}"\nweight = 0', "> 0"),
    "an endless weight": (f'[keys.alice]\nsha256 = "{HASH}"\nweight = inf', "finite"),
    "a key of two": (entry("alice", KEY) + entry("bob", KEY), "[keys.bob] has the same key"),
    "too many": (
        "".join(entry(f"k{number}", str(number)) for number in range(MAX_KEYS + 1)),
        "more than",
    ),
}


@pytest.mark.parametrize(("text", "says"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_used_is_said_without_repeating_it(
    tmp_path: Path, text: str, says: str
) -> None:
    with pytest.raises(SettingError) as refused:
        read_keys(write(tmp_path, text))
    assert says in str(refused.value)
    assert KEY not in str(refused.value)
    assert HASH not in str(refused.value)


def test_a_broken_file_keeps_the_keys_and_logs_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, entry("alice", KEY))
    keys = Keys(str(file))
    reloader = Reloader("the file of keys", [file], keys.load)
    with caplog.at_level(logging.DEBUG):
        for text, _ in BROKEN.values():
            write(tmp_path, text)
            reloader.reload()
        file.unlink()
        reloader.reload()
        assert keys.find(KEY) is not None
        assert caplog.text.count("stays in force") == len(BROKEN) + 1
        write(tmp_path, entry("bob", "other"))
        reloader.reload()
    assert keys.find(KEY) is None
    assert keys.find("other") is not None
    assert "bob" in caplog.text
    for secret in (KEY, HASH, fingerprint("other").hex()):
        assert secret not in caplog.text


def test_a_reload_keeps_what_a_name_has_used_and_takes_its_new_limits(tmp_path: Path) -> None:
    file = write(tmp_path, entry("alice", KEY, "requests_per_minute = 2"))
    keys = Keys(str(file), clock=lambda: 0.0)
    before = keys.find(KEY)
    assert before is not None
    with before.account.request():
        write(
            tmp_path,
            f'[keys.alice]\nsha256 = ["{HASH}", "{fingerprint("new").hex()}"]\n'
            "requests_per_minute = 4\n",
        )
        keys.load()
        for key in (KEY, "new"):  # both, while one takes the place of the other
            tenant = keys.find(key)
            assert tenant is not None
            assert tenant.account is before.account
            assert (tenant.id, tenant.salt) == (before.id, before.salt)
        assert before.account.running == 1
        assert before.account.headers()["x-ratelimit-limit-requests"] == "4"
        assert before.account.headers()["x-ratelimit-remaining-requests"] == "2"


def test_keys_of_the_settings_stay_beside_those_of_the_file(tmp_path: Path) -> None:
    keys = Keys(str(write(tmp_path, entry("alice", KEY))), ("one", "two"), (1.0, 3.0))
    assert list(keys.accounts) == ["api-key-1", "api-key-2", "alice"]
    two = keys.find("two")
    assert two is not None
    assert two.weight == 3.0
    with pytest.raises(SettingError, match="api-key-1"):
        Keys(str(write(tmp_path, entry("api-key-1", KEY))), ("one",))
    assert not Keys("").needed
    unsalted = Keys(str(write(tmp_path, entry("alice", KEY))), salted=False).find(KEY)
    assert unsalted is not None
    assert unsalted.salt == b""


def test_a_server_does_not_start_with_a_file_it_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNVL_API_KEY", "secret")
    file = write(tmp_path, f"[keys.alice]\nsha256 = '{KEY}'")
    assert cli.main(["serve", "--api-keys-file", str(file)]) == cli.EXIT_USAGE
    said = capsys.readouterr().err
    assert "[keys.alice]: sha256 must be" in said
    assert KEY not in said
    assert "INTERNVL_API_KEY" not in os.environ  # children inherit it no more


def test_a_fresh_key_is_never_the_same() -> None:
    assert len({new_key("a")[0] for _ in range(100)}) == 100


def test_the_operators_port_needs_a_file_of_keys_and_a_free_port(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--admin-port", "9"]) == cli.EXIT_USAGE
    assert "admin_port needs admin_key_file" in capsys.readouterr().err
    file = write(tmp_path, entry("ops", KEY))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = ["--admin-port", port, "--admin-key-file", str(file)]
        assert cli.main(["serve", *flags]) == cli.EXIT_USAGE
    assert "admin_port: Address already in use" in capsys.readouterr().err
