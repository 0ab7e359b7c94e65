"""Mixed traffic for long, on the demo model: no process grows. ``benchmarks/soak.py`` is the same
for longer."""

import asyncio
from pathlib import Path

import pytest

from tests.servers import Server
from tests.soak import FLAGS, Soak

REQUESTS = 1500
# Caches are full by then, threads started, libraries' tables filled.
WARM_UP = 500
# What is kept of a request by mistake is kept of a thousand: a kilobyte each of the front end and
# the engine would be found. A decoder's heap ends a round as its last picture or video left it,
# up to 4 MiB apart: what is bounded there is three kilobytes.
MOST = {"api": 1 << 20, "engine": 1 << 20, "decoder": 3 << 20}


@pytest.mark.slow
def test_no_process_grows(tmp_path: Path) -> None:
    server = Server(tmp_path / "log.txt", FLAGS)
    try:
        report = asyncio.run(Soak(server).run(REQUESTS))
    finally:
        server.close()
    assert {name.split()[0] for name in report.anonymous} == set(MOST)
    slopes = {name: report.slope(name, WARM_UP) for name in report.anonymous}
    grown = {
        name: f"{slope:.0f} bytes per 1,000 requests: {report.anonymous[name]}"
        for name, slope in slopes.items()
        if slope > MOST[name.split()[0]]
    }
    assert not grown
