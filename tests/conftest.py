"""Fixtures shared by the test folders."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.servers import Server

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
