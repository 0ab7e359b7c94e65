"""What a collector of traces is sent about a request, and that no request notices the collector."""

import asyncio
import itertools
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine.client import environment
from tests.api.conftest import House, Houses, listening
from tests.api.test_life import within
from tests.collector import Collector, Tree
from tests.fake_engine import EOS, FakeEngine, Script, Step, say
from tests.servers import ROOT
from tests.small_tokenizer import encode_rendered
from wire import spans
from wire.errors import EngineFailed
from wire.logs import trace_id
from wire.messages import EngineOutput, EngineRequest, Times
from wire.settings import SettingError, TracingSettings

CHAT = "/v1/chat/completions"
SERVER, INTERNAL = 2, 1
CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "Kleopatra"
PICTURE = {"type": "image_url", "image_url": {"url": f"https://example.org/{SECRET}?key={SECRET}"}}


def user(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content) or SECRET}]}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


class Traced:
    """A house whose requests are traced."""

    def __init__(self, house: House, collector: Collector) -> None:
        self.house = house
        self.collector = collector
        self._asked = 0

    async def ask(self, path: str = CHAT, headers: Any = (), **body: Any) -> httpx.Response:
        body = user() | body
        return await self.house.http.post(path, json=body, headers=dict(headers))

    async def trees(self, *answers: httpx.Response) -> list[Tree]:
        """Of these requests; there will be no more."""
        await self.house.app.state.tracing.close()
        return [self.collector.of(answer.headers["x-request-id"]) for answer in answers]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.tracing.FLUSH_TIMEOUT", 60.0)


@pytest.fixture
async def traced(houses: Houses, collector: Collector) -> Traced:
    house = await houses.open(tracing=TracingSettings(collector.url))
    return Traced(house, collector)


async def test_a_request_is_a_tree_of_spans_with_what_it_was_and_what_it_took(
    traced: Traced,
) -> None:
    traced.house.engine.script = say("A red circle.", cached=2)
    answer = await traced.ask(temperature=0.5, max_tokens=40)
    usage = answer.json()["usage"]
    (tree,) = await traced.trees(answer)
    assert tree.shape == {
        f"POST {CHAT}": [
            {"chat tiny": [{"decode": []}, {"prefill": []}]},
            {"prompt": []},
            {"read": []},
        ]
    }
    top, chat = tree.top, tree.one("chat tiny")
    assert (top.kind, top.parent, top.failed) == (SERVER, "", False)
    assert top.attributes == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "url.scheme": "http",
        "url.path": CHAT,
        "network.protocol.version": "1.1",
        "http.response.status_code": 200,
        "http.response.header.x-request-id": [answer.headers["x-request-id"]],
    }
    assert chat.kind == INTERNAL
    assert chat.attributes.pop("gen_ai.response.time_to_first_chunk") > 0
    assert chat.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "internvl",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.stream": False,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 2,
        "internvl.pictures": 0,
        "internvl.tiles": 0,
        "internvl.visual_tokens": 0,
    }
    assert tree.one("decode").attributes["internvl.tokens"] == usage["completion_tokens"]
    sent = int(answer.request.headers["content-length"])
    assert tree.one("read").attributes == {"http.request.body.size": sent}
    service = tree.top.service
    assert service["service.name"] == "internvl-server"
    assert service["service.version"]


async def test_a_stream_has_the_same_tree_and_each_choice_its_own_decoding(
    traced: Traced,
) -> None:
    whole = await traced.ask(n=2)
    stream = await traced.ask(n=2, stream=True)
    assert stream.text.endswith("[DONE]\n\n")
    one, other = await traced.trees(whole, stream)
    assert one.shape == other.shape
    assert [span.attributes["internvl.choice"] for span in one.all("decode")] == [0, 1]
    chat = other.one("chat tiny").attributes
    assert chat["gen_ai.request.stream"] is True
    assert chat["gen_ai.request.choice.count"] == 2
    assert chat["gen_ai.response.finish_reasons"] == ["stop", "stop"]


async def test_what_the_engine_measured_stands_before_the_first_token(traced: Traced) -> None:
    def script(request: EngineRequest) -> Iterator[Step]:
        first = encode_rendered("A")
        yield EngineOutput(request.id, first, times=Times(queue=0.001, prefill=0.002))
        yield EngineOutput(request.id, [EOS], "stop", EOS, times=Times(decode=9.0))

    never = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, never.set)
    traced.house.engine.script = lambda request: itertools.chain([never], script(request))
    (tree,) = await traced.trees(await traced.ask())
    queue, prefill = tree.one("queue"), tree.one("prefill")
    assert queue.seconds == pytest.approx(0.001, abs=1e-5)
    assert prefill.seconds == pytest.approx(0.002, abs=1e-5)
    assert queue.end == prefill.begin
    assert tree.one("chat tiny").begin <= queue.begin


async def test_other_dialects_and_completions_are_traced_too(traced: Traced) -> None:
    message = await traced.ask("/v1/messages", max_tokens=20, model="tiny")
    text = await traced.house.http.post("/v1/completions", json={"prompt": [SECRET, "Hi"]})
    files = await traced.house.http.get("/v1/files/file-unknown")
    one, other, missing = await traced.trees(message, text, files)
    assert one.shape[("POST /v1/messages")]
    assert len(other.all("text_completion tiny")) == 2
    assert missing.top.name.startswith("GET /v1/files/{")
    assert missing.top.attributes["error.type"] == "file_not_found"


async def test_choosing_the_best_answer_has_its_own_span(traced: Traced) -> None:
    answer = await traced.ask(best_of={"n": 2, "critic": "vote"})
    assert answer.status_code == 200, answer.text
    (tree,) = await traced.trees(answer)
    critic = tree.one("critic")
    assert critic.attributes == {"internvl.critic": "vote"}
    assert critic.parent == tree.top.id
    assert tree.one("chat tiny").end <= critic.begin


async def test_what_goes_on_in_the_background_stays_in_the_trace_of_who_asked(
    traced: Traced,
) -> None:
    go_on = asyncio.Event()

    def script(request: EngineRequest) -> Iterator[Step]:
        yield go_on
        yield from say("A red circle.")(request)

    traced.house.engine.script = script
    body = {"input": SECRET, "background": True}
    first = await traced.house.http.post("/v1/responses", json=body)
    place = f"/v1/responses/{first.json()['id']}"
    go_on.set()
    while (await traced.house.http.get(place)).json()["status"] != "completed":
        await asyncio.sleep(0)
    (tree,) = await traced.trees(first)
    chat = tree.one("chat tiny")
    assert chat.parent == tree.top.id
    assert chat.end > tree.top.end
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["stop"]


async def test_the_trace_of_a_client_goes_on_here(traced: Traced) -> None:
    trace, span = CLIENT
    headers = {"traceparent": f"00-{trace}-{span}-01", "tracestate": "vendor=1", "baggage": "a=1"}
    (tree,) = await traced.trees(await traced.ask(headers=headers))
    assert (tree.top.trace, tree.top.parent) == CLIENT
    assert {span.trace for span in traced.collector.spans} == {trace}
    assert b"vendor=1" in traced.collector.raw
    assert "baggage" not in str(traced.collector.spans)


async def test_a_client_that_does_not_sample_its_trace_gets_none_here(
    traced: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    trace, span = CLIENT
    caplog.set_level(logging.INFO)
    kept: list[object] = []

    def script(request: EngineRequest) -> Iterator[Step]:
        kept.append(spans.current.get())
        yield from say("A red circle.")(request)

    traced.house.engine.script = script
    await traced.ask(headers={"traceparent": f"00-{trace}-{span}-00"}, stream=True)
    assert kept == [None]  # nothing is done for it
    await traced.house.app.state.tracing.close()
    assert not traced.collector.spans
    assert f"trace={trace}" in caplog.text  # where it can still be found


async def test_the_ratio_is_of_requests_that_do_not_say_whether_they_are_traced(
    houses: Houses, collector: Collector
) -> None:
    house = await houses.open(tracing=TracingSettings(collector.url, otlp_traces_ratio=0.0))
    traced = Traced(house, collector)
    await traced.ask()
    trace, span = CLIENT
    answer = await traced.ask(headers={"traceparent": f"00-{trace}-{span}-01"})
    await traced.trees(answer)
    assert {span.trace for span in collector.spans} == {trace}


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", SECRET)],
        [("traceparent", "00-" + "0" * 32 + "-00f067aa0ba902b7-01")],
        [("traceparent", "00-" + "a" * 10_000)],
        [("traceparent", "ff-" + "-".join(CLIENT) + "-01")],
        [("traceparent", "00-" + "-".join(CLIENT) + "-01")] * 2,
        [("tracestate", f"{SECRET}={SECRET}")],
        [
            ("traceparent", b"00-" + b"-".join(part.encode() for part in CLIENT) + b"-\xff1"),
        ],
        [("b3", "-".join(CLIENT))],
    ],
)
async def test_a_trace_that_is_none_is_passed_over(
    traced: Traced, headers: list[tuple[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    answer = await traced.house.http.post(CHAT, json=user(), headers=headers)
    assert answer.status_code == 200
    (tree,) = await traced.trees(answer)
    assert tree.top.parent == ""
    assert tree.top.trace != CLIENT[0]
    assert SECRET not in caplog.text
    assert SECRET.encode() not in traced.collector.raw


async def test_a_state_of_the_trace_that_is_none_is_left_out(
    traced: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"traceparent": "00-" + "-".join(CLIENT) + "-01", "tracestate": f"{SECRET} {SECRET}"}
    (tree,) = await traced.trees(await traced.ask(headers=headers))
    assert tree.top.trace == CLIENT[0]
    assert SECRET not in caplog.text
    assert SECRET.encode() not in traced.collector.raw


async def test_an_error_is_in_its_trace_by_its_code_and_only_the_servers_own_as_failure(
    traced: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bad = {"type": "image_url", "image_url": {"url": f"https://example.org/bad-{SECRET}"}}
    wrong = await traced.ask(**user(bad))
    assert wrong.status_code == 400
    traced.house.engine.script = lambda request: [EngineFailed(f"not for {SECRET}")]
    failed = await traced.ask()
    assert failed.status_code == 500
    lost = await traced.house.http.get(f"/{SECRET}")
    one, other, nowhere = await traced.trees(wrong, failed, lost)
    assert one.top.attributes["error.type"] == one.one("media").attributes["error.type"]
    assert one.top.attributes["error.type"] == wrong.json()["error"]["code"]
    assert one.top.attributes["http.response.status_code"] == 400
    assert not any(span.failed for span in (one.top, one.one("media")))
    assert other.top.attributes["error.type"] == failed.json()["error"]["code"]
    assert other.top.failed
    assert other.one("chat tiny").failed
    assert nowhere.top.name == "GET"
    assert "url.path" not in nowhere.top.attributes
    assert f"trace={other.top.trace}" in caplog.text
    assert SECRET.encode() not in traced.collector.raw


async def test_what_is_refused_at_the_door_is_of_its_route(
    houses: Houses, collector: Collector
) -> None:
    house = await houses.open(api_key=("key",), tracing=TracingSettings(collector.url))
    answer = await house.ask()
    assert answer.status_code == 401
    (tree,) = await Traced(house, collector).trees(answer)
    assert tree.top.name == f"POST {CHAT}"
    assert tree.top.attributes["error.type"] == answer.json()["error"]["code"]


async def test_an_error_within_a_stream_is_in_its_trace(traced: Traced) -> None:
    def script(request: EngineRequest) -> Iterator[Step]:
        yield EngineOutput(request.id, encode_rendered("A"))
        raise EngineFailed("gone")

    traced.house.engine.script = script
    answer = await traced.ask(stream=True)
    assert answer.status_code == 200
    (tree,) = await traced.trees(answer)
    assert tree.top.failed
    assert tree.top.attributes["error.type"] == "engine_error"
    assert tree.top.attributes["http.response.status_code"] == 200
    chat = tree.one("chat tiny")
    assert chat.failed
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["abort"]


async def test_a_client_that_leaves_is_seen_in_the_trace_with_the_tokens_until_then(
    houses: Houses, collector: Collector
) -> None:
    never = asyncio.Event()
    engine = FakeEngine(script=endless(never))
    house = await houses.open(engine, tracing=TracingSettings(collector.url))
    async with (
        listening(house) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        asked = client.stream("POST", CHAT, json=user() | {"stream": True})
        async with asked as answer:
            await anext(answer.aiter_raw())
        await within(engine.abort_seen.wait())
    (tree,) = await Traced(house, collector).trees(answer)
    chat = tree.one("chat tiny")
    assert not chat.failed
    assert chat.attributes["error.type"] == "aborted"
    assert chat.attributes["gen_ai.usage.output_tokens"] == 1
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert tree.one("decode").end <= tree.top.end


def endless(never: asyncio.Event) -> Script:
    def script(request: EngineRequest) -> Iterator[Step]:
        yield EngineOutput(request.id, encode_rendered("A")[:1])
        yield never
        yield EngineOutput(request.id, [EOS], "stop", EOS)

    return script


async def test_a_stream_that_is_read_again_names_the_trace_that_it_is_of(traced: Traced) -> None:
    options = {"stream": True, "stream_options": {"resumable": True}}
    first = await traced.ask(**options)
    place = first.headers["content-location"]
    again = await traced.house.http.get(f"/v1/chat/{place}")
    assert again.text == first.text
    one, other = await traced.trees(first, again)
    assert one.one("decode")
    assert other.top.trace != one.top.trace
    assert other.top.links == [one.top.id]
    assert other.top.name == "GET /v1/chat/completions/{name}/events"


async def test_nothing_that_a_client_has_sent_is_in_a_trace(traced: Traced) -> None:
    path = f"{CHAT}?{SECRET}={SECRET}"
    headers = {"User-Agent": SECRET, "X-Something": SECRET, "Authorization": SECRET}
    body = user({"type": "text", "text": SECRET}, PICTURE) | {"stop": [SECRET], "user": SECRET}
    answer = await traced.ask(path, headers, **body)
    assert answer.status_code == 200, answer.text
    await traced.trees(answer)
    assert SECRET.encode() not in traced.collector.raw
    assert b"red" not in traced.collector.raw  # nor the answer


@pytest.mark.parametrize("address", ["models", "files", "responses", "web/1"])
async def test_an_id_that_is_none_of_ours_is_not_in_a_trace(traced: Traced, address: str) -> None:
    prefix = "" if address.startswith("web") else "/v1"
    answer = await traced.house.http.get(f"{prefix}/{address}/{SECRET}")
    assert answer.status_code == 404
    (tree,) = await traced.trees(answer)
    assert tree.top.name.startswith(f"GET {prefix}/{address[:3]}")
    assert SECRET.encode() not in traced.collector.raw


async def test_an_id_of_ours_is_in_its_trace(traced: Traced) -> None:
    (model,) = (await traced.house.http.get("/v1/models")).json()["data"]
    path = f"/v1/models/{model['id']}"
    (tree,) = await traced.trees(await traced.house.http.get(path))
    assert tree.top.attributes["url.path"] == path


async def test_probes_are_not_traced(traced: Traced) -> None:
    for path in ("/live", "/started", "/ready", "/health", "/metrics"):
        assert (await traced.house.http.get(path)).status_code == 200
    answer = await traced.house.http.get("/v1/models")
    await traced.trees(answer)
    assert [span.name for span in traced.collector.spans] == ["GET /v1/models"]


async def test_a_collector_that_fails_is_told_of_once_and_no_request_notices(
    houses: Houses, collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    caplog.set_level(logging.INFO)
    collector.broken = True
    house = await houses.open(tracing=TracingSettings(collector.url))
    traced = Traced(house, collector)
    for calls in range(1, 4):
        assert (await traced.ask()).status_code == 200
        await asyncio.to_thread(collector.wait_for_calls, calls)
    told = [record for record in caplog.records if "collector" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"]
    assert "400" in told[0].getMessage()
    collector.broken = False
    answer = await traced.ask()
    await traced.trees(answer)
    told = [record for record in caplog.records if "collector" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING", "INFO"]


async def test_a_collector_that_never_answers_does_not_hold_up_the_end(
    houses: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.tracing.FLUSH_TIMEOUT", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")  # seconds
    with socket.create_server(("127.0.0.1", 0)) as door:
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        house = await houses.open(tracing=TracingSettings(url))
        assert (await house.ask()).status_code == 200
        async with asyncio.timeout(25):  # less than the patience of what hands over the spans
            await house.app.state.tracing.close()


async def test_more_spans_than_can_wait_are_dropped_without_a_word(
    houses: Houses, collector: Collector, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.tracing.QUEUE", 8)
    monkeypatch.setattr("server.tracing.BATCH", 8)
    collector.broken = True
    house = await houses.open(tracing=TracingSettings(collector.url))
    traced = Traced(house, collector)
    answers = [await traced.ask() for _ in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    await house.app.state.tracing.close()
    assert sum("collector" in record.getMessage() for record in caplog.records) <= 1


@pytest.mark.parametrize(
    "url", ["collector:4318", "ftp://collector", "http://", "http://a:b@c/", "http://c/?key=1"]
)
async def test_what_is_no_address_of_a_collector_is_refused_at_the_start(
    houses: Houses, url: str
) -> None:
    with pytest.raises(SettingError, match="otlp_traces_endpoint"):
        await houses.open(tracing=TracingSettings(url))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-1", "schedule_delay"),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "authorization=a%20key%0A",
            "OTLP_HEADERS has characters that no header can hold$",
        ),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "authorization=ключ", "OTLP_TRACES_HEADERS has"),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "nobody", "nobody"),
    ],
)
async def test_a_variable_of_opentelemetry_that_is_wrong_is_told_of_at_the_start(
    houses: Houses,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    told: str,
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=told):
        await houses.open(tracing=TracingSettings(collector.url))


async def test_what_opentelemetry_itself_switches_off_is_off(
    houses: Houses,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    caplog.set_level(logging.INFO)
    house = await houses.open(tracing=TracingSettings(collector.url))
    assert (await house.ask()).status_code == 200
    await house.app.state.tracing.close()
    assert not collector.calls
    assert "trace=" not in caplog.text


async def test_a_collector_without_a_path_is_asked_at_the_usual_one(
    houses: Houses, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20token")
    base = collector.url.removesuffix("/v1/traces")
    house = await houses.open(tracing=TracingSettings(base, otlp_service_name="mine"))
    traced = Traced(house, collector)
    (tree,) = await traced.trees(await traced.ask())
    assert tree.top.service["service.name"] == "mine"
    assert collector.headers[0]["authorization"] == "Bearer token"


async def test_json_lines_name_the_trace(traced: Traced, caplog: pytest.LogCaptureFixture) -> None:
    from wire.logs import _Json

    caplog.set_level(logging.INFO)
    lines: list[dict[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.loads(_Json("api").format(record)))  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        (tree,) = await traced.trees(await traced.ask())
    finally:
        logging.getLogger().removeHandler(handler)
    (access,) = [line for line in lines if line["logger"] == "server.access"]
    assert access["trace_id"] == tree.top.trace
    assert (trace_id.get(), spans.current.get()) == (None, None)


def test_opentelemetry_is_loaded_only_where_something_is_traced() -> None:
    code = (
        "import sys, server.app, server.run, preprocessing\n"
        "sys.exit(any(name in sys.modules for name in ('opentelemetry.sdk', 'requests')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


async def test_the_web_framework_traces_nothing_by_itself(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    assert (await house.ask()).status_code == 200
    assert not exporter.get_finished_spans()


def test_the_keys_of_a_collector_do_not_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={SECRET}")
    assert SECRET not in str(environment())
