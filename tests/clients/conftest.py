"""The server that the clients talk to. It runs with --strict-fields: what a client sends unasked
must be known, or the client is refused."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.asking import KEY, SINGLE
from tests.servers import ROOT, Server

# Nobody phones home: litellm for prices, others with what they saw. Read at import.
os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LANGSMITH_TRACING": "false",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}
KEYS = """\
[keys.plain]
sha256 = "{}"

[keys.single]
sha256 = "{}"
max_concurrent_requests = 1
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("server")
    keys = folder / "keys.toml"
    keys.write_text(
        KEYS.format(*(hashlib.sha256(key.encode()).hexdigest() for key in (KEY, SINGLE)))
    )
    flags = ["--api-keys-file", str(keys), "--open-metrics", "--strict-fields"]
    flags += ["--allow-private-media", "--allowed-media-ports", ""]
    server = Server(folder / "log.txt", flags, python=str(ROOT / ".venv/bin/python"))
    yield server
    server.close()
