"""A real Prometheus scrapes a server under load whose engine is killed: the dashboard has something
to show everywhere, and the alert that should fire does."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.metric_table import TABLE
from tests.observability.queries import QUERIES, filled
from tests.prometheus import JOB, Prometheus
from tests.servers import ROOT, Server, data_uri, draw, encode

KEY = "sk-observed"
HEADERS = {"Authorization": f"Bearer {KEY}"}
CHAT = "/v1/chat/completions"
# Counters and histograms that this load does not move.
STILL = {
    "internvl_best_of_total",
    "internvl_critic_restarts_total",
    "internvl_critic_seconds",
    "internvl_decode_workers_replaced_total",
    "internvl_files_evicted_total",
    "internvl_key_requests_refused_total",
    "internvl_num_preemptions_total",
    "internvl_requests_given_up_total",
    "internvl_requests_refused_total",
    "internvl_sandbox_kills_total",
    "internvl_streams_resumed_total",
}


def ask(server: Server, *content: Any, **body: Any) -> int:
    """The status."""
    body = {"messages": [{"role": "user", "content": list(content) or "Hello!"}]} | body
    body = {"max_tokens": 8, "ignore_eos": True} | body
    return httpx.post(server.url + CHAT, json=body, headers=HEADERS, timeout=60).status_code


def work(server: Server, size: int) -> None:
    """Some of everything."""
    url = data_uri(encode(draw("red", "circle", (size, size))))
    picture = {"type": "image_url", "image_url": {"url": url}}
    for _ in range(2):  # the second finds what the first has left
        assert ask(server, picture, {"type": "text", "text": "What?"}) == 200
    assert ask(server, {"type": "text", "text": "Say what this is:"}, picture) == 200
    assert ask(server, n=2, stream=True) == 200
    broken = {"type": "image_url", "image_url": {"url": data_uri(b"no picture")}}
    assert ask(server, broken) == 400
    assert httpx.get(server.url + "/v1/models", timeout=60).status_code == 401


def kill_engine_under(server: Server) -> None:
    """A stream pauses and goes on."""
    body = {"messages": [{"role": "user", "content": "Hello!"}], "ignore_eos": True}
    body |= {"stream": True, "max_tokens": 1000}
    (engine,) = server.children("engine")
    with httpx.stream("POST", server.url + CHAT, json=body, headers=HEADERS, timeout=90) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines)[6:])
        os.kill(engine, signal.SIGKILL)
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("scraped")
    keys = folder / "keys.toml"
    keys.write_text(f'[keys.team]\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n')
    # No decode worker is ended by the clock, however busy the machine is.
    flags = ["--api-keys-file", str(keys), "--media-timeout", "600"]
    server = Server(folder / "log.txt", flags)
    try:
        prometheus = Prometheus(folder, server, KEY, ROOT / "helm/files/alerts.yaml")
        try:
            work(server, 64)
            kill_engine_under(server)
            work(server, 200)
            prometheus.wait_scraped()
            yield prometheus
        finally:
            prometheus.close()
    finally:
        server.close()


def test_every_query_of_the_dashboard_has_something_to_show(scraped: Prometheus) -> None:
    empty = [query for query in QUERIES if not scraped.query(filled(query))]
    assert not empty


def test_every_metric_is_there_and_has_moved_if_it_should(scraped: Prometheus) -> None:
    still = set()
    for row in TABLE.values():
        samples = scraped.query(row.name + "_count" * (row.kind == "histogram"))
        assert samples, row.name
        if row.kind != "gauge" and not any(value for _, value in samples):
            still.add(row.name)
    assert still == STILL


def test_the_replicas_to_choose_from_are_there(scraped: Prometheus) -> None:
    ((labels, one),) = scraped.query("internvl_build_info")
    assert (labels["job"], labels["model"], one) == (JOB, "internvl-demo", 1.0)


def test_the_loss_of_an_engine_is_an_alert_and_nothing_else_is(scraped: Prometheus) -> None:
    scraped.wait_for_alert("InternVLEngineLost")
    assert scraped.alerts() == {"InternVLEngineLost"}
    ((_, lost),) = scraped.query("sum(internvl_engine_faults_total)")
    ((_, resumed),) = scraped.query("internvl_requests_resumed_total")
    assert (lost, resumed) == (1.0, 1.0)
