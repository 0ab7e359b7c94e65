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
# Of a thousand requests; 5,000 in benchmarks/results/soak.json have 44 KB, 0, and 1.2 and 1.8 MB. A
# step of the heap, which comes once, is up to 1.2 MB for ten rounds, and 6 MB of a decoder: it ends
# a round as its last picture or video left it. What decoders keep is looked at more closely in
# tests/process/test_decoder_memory.py. Planted leaks were found of 4 KB per request in the front
# end, and of 12 KB in the engine, whose start leaves 10 MB of holes that are filled first.
MOST = {"api": 2 << 20, "engine": 2 << 20, "decoder": 8 << 20}


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
    # Pools of threads fill up to their bounds; whatever a request opened is closed.
    for counts in (*report.threads.values(), *report.descriptors.values()):
        assert max(counts) < 64
