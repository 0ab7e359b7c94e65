"""Fixtures shared by the test folders."""

import fcntl
import importlib.metadata
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.servers import Server

# What is started in the background ignores Ctrl-C, which programs in tests must not inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# They have an environment of their own: `make clients`.
collect_ignore = ["clients"]

PILLOW = importlib.metadata.version("pillow")
FETCH = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]

# A test judges behaviour, never the speed of the machine it runs on; and a change is judged by
# the same examples as the one before. "--hypothesis-profile explore" looks for new ones.
settings.register_profile(
    "here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("here"), derandomize=False)
settings.load_profile("here")


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server as a newcomer starts it, with the embedded demo model; shared by all tests."""
    server = Server(
        tmp_path_factory.mktemp("server") / "log.txt",
        ["--allow-private-media", "--allowed-media-ports", ""],
    )
    yield server
    server.close()


@pytest.fixture(scope="session")
def corpus(request: pytest.FixtureRequest) -> list[Path]:
    """The files of Tests/images; fetched once and kept in pytest's cache."""
    kept = Path(request.config.cache.mkdir(f"pillow-{PILLOW}"))  # type: ignore[union-attr]
    done = kept / "complete"
    with done.open("a") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)  # another worker may be fetching
        if not done.stat().st_size:
            fetch_corpus(kept)
            mark.write("\n")
    return sorted(path for path in kept.iterdir() if path != done)


def fetch_corpus(folder: Path) -> None:
    fetched = subprocess.run(
        [*FETCH, "--dest", str(folder), f"pillow=={PILLOW}"],
        capture_output=True,
        timeout=280,
        check=False,
    )
    if fetched.returncode:
        reason = f"pip cannot fetch Pillow's sources: {fetched.stderr.decode()[-300:]}"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        for member in sources:
            _, inside, name = member.name.partition("/Tests/images/")
            file = sources.extractfile(member) if inside else None
            if file is not None:
                (folder / name.replace("/", "-")).write_bytes(file.read())
    archive.unlink()
