"""What a collector gets of a real server: from the header of a request to the death of an engine
and the last span before the end."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.collector import Collector
from tests.e2e.test_faults import House
from tests.servers import Server, data_uri, draw, encode

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello!"}], "ignore_eos": True}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[House]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        flags = ("--otlp-traces-endpoint", collector.url, "--log-format", "json")
        house = House(tmp_path_factory.mktemp("traced"), *flags)
    yield house
    house.close()


def ask(server: Server, name: str, *content: Any, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": list(content) or "Hello!"}]
    body = HELLO | {"messages": messages, "max_tokens": 4} | body
    answer = httpx.post(server.url + CHAT, json=body, headers={"X-Request-Id": name}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def picture(colour: str, size: int = 64) -> dict[str, Any]:
    url = data_uri(encode(draw(colour, "circle", (size, size))))
    return {"type": "image_url", "image_url": {"url": url}}


def test_each_picture_has_its_spans_and_one_that_was_cached_says_so(
    house: House, collector: Collector
) -> None:
    red, blue = picture("red"), picture("blue", 200)
    first = ask(house.server, "first", red, blue, {"type": "text", "text": "What?"})
    ask(house.server, "again", red, {"type": "text", "text": "What?"})
    tree = collector.of("first")
    one = {"media.decode": [{"media.tile": []}]}
    media = {"media": [one, one, {"media.fetch": []}, {"media.fetch": []}]}
    prefill = {"prefill": [{"encode": []}]}
    generated = {"chat internvl-demo": [{"decode": []}, prefill, {"queue": []}]}
    assert tree.shape == {f"POST {CHAT}": [generated, media, {"prompt": []}, {"read": []}]}
    usage = first.json()["usage"]
    told = {span.attributes["internvl.media.part"]: span for span in tree.all("media.decode")}
    for index, one in enumerate(usage["internvl"]["images"]):
        decode = told[f"messages[0].content[{index}].image_url.url"]
        assert decode.attributes["internvl.media.tiles"] == one["tiles"]
        assert decode.attributes["internvl.media.cache_hit"] is False
        assert decode.attributes["internvl.media.kind"] == "image"
    assert all(fetch.attributes["internvl.media.bytes"] > 0 for fetch in tree.all("media.fetch"))
    chat = tree.one("chat internvl-demo")
    assert chat.attributes["internvl.pictures"] == 2
    assert chat.attributes["internvl.tiles"] == sum(p["tiles"] for p in usage["internvl"]["images"])
    # All is within what it is a part of, and media are over before the engine begins.
    for span in collector.spans:
        if span.trace == tree.top.trace:
            assert tree.top.begin <= span.begin <= span.end <= tree.top.end
    queue, prefill, decode = (tree.one(name) for name in ("queue", "prefill", "decode"))
    assert chat.begin <= queue.begin <= queue.end <= prefill.begin
    assert prefill.end <= decode.begin <= decode.end <= chat.end
    assert tree.one("media").end <= tree.one("prompt").begin <= chat.begin
    again = collector.of("again")
    assert again.one("media.decode").attributes["internvl.media.cache_hit"] is True
    assert not again.all("encode") + again.all("media.tile")


def test_a_stream_that_outlives_its_engine_is_one_trace(house: House, collector: Collector) -> None:
    server = house.server
    body = HELLO | {"stream": True, "max_tokens": 150}
    headers = {"X-Request-Id": "survivor"}
    with httpx.stream("POST", server.url + CHAT, json=body, headers=headers, timeout=90) as answer:
        lines = answer.iter_lines()
        name = json.loads(next(lines)[6:])["id"]
        os.kill(house.engine(), signal.SIGKILL)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    tree = collector.of("survivor")
    chat = tree.one("chat internvl-demo")
    assert chat.attributes["gen_ai.response.id"] == name
    assert chat.attributes["gen_ai.usage.output_tokens"] == 150
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert "error.type" not in {**chat.attributes, **tree.top.attributes}
    assert chat.attributes["internvl.engine_restarts"] == 1
    assert tree.one("decode").attributes["internvl.tokens"] == 150
    log = [json.loads(line) for line in server.log.read_text().splitlines()]
    on = [line for line in log if f"request={name} goes on" in line["message"]]
    assert [line["request_id"] for line in on] == ["survivor"]
    access = [line for line in log if line["logger"] == "server.access"]
    assert {line["trace_id"] for line in access if line["request_id"] == "survivor"} == {
        tree.top.trace
    }


def test_the_last_spans_are_sent_before_the_server_ends(
    tmp_path: Path, collector: Collector
) -> None:
    slow = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
    flags = ("--otlp-traces-endpoint", collector.url)
    server = Server(tmp_path / "log.txt", flags, environment=slow)
    ask(server, "last")
    assert not any("last" in str(span.attributes) for span in collector.spans)
    server.process.send_signal(signal.SIGTERM)
    assert collector.of("last").one("decode").attributes["internvl.tokens"] == 4
    assert server.process.wait(60) == 0
