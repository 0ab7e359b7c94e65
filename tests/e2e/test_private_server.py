"""The server that a command starts for itself: who may ask it, and when it ends."""

from pathlib import Path

import httpx

from server.private import private_server
from tests.servers import ROOT
from wire.settings import EngineSettings, ServerSettings, Settings

DEMO = ROOT / "demo" / "checkpoint" / "hf"


def test_it_is_for_whoever_started_it_alone() -> None:
    server = ServerSettings(host="0.0.0.0", api_key=("theirs",), log_level="warning")
    with private_server(Settings(server, engine=EngineSettings(model=str(DEMO)))) as target:
        assert target.process is not None
        target.wait_ready()
        folder = Path("/proc", str(target.process.pid))
        assert target.url.startswith("http://127.0.0.1:")
        assert target.key not in (folder / "cmdline").read_text()
        assert target.key not in (folder / "environ").read_text()
        assert target.model() == "hf"
        for key, status in (("", 401), ("theirs", 401), (target.key, 200)):
            headers = {"x-api-key": key} if key else {}
            answer = httpx.get(
                target.url + "/v1/models", headers=headers, trust_env=False, timeout=60
            )
            assert answer.status_code == status
    assert target.process.poll() is not None
    assert target.ended
