"""What stands around the API: other origins, proxies' paths, and what is no HTTP."""

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import House, Houses, listening
from tests.api.test_errors import error_of
from tests.api.test_life import stuck

PAGE = "https://chat.example.org"
ASKING = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


async def test_pages_of_other_origins_are_told_nothing_by_default(houses: Houses) -> None:
    house = await houses.open(api_key=("key",))
    for headers in ({"Origin": PAGE}, ASKING, ASKING | {"Authorization": "Bearer key"}):
        for method in ("GET", "OPTIONS"):
            answer = await house.http.request(method, "/v1/models", headers=headers)
            assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_page_that_may_asks_without_a_key_and_then_needs_one(houses: Houses) -> None:
    house = await houses.open(api_key=("key",), cors_origins=(PAGE,))
    asked = await house.http.options("/v1/chat/completions", headers=ASKING)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in asked.headers
    assert "Origin" in asked.headers["vary"]
    for key, status in (("key", 200), ("wrong", 401)):
        headers = {"Origin": PAGE, "Authorization": f"Bearer {key}"}
        answer = await house.http.get("/v1/models", headers=headers)
        assert answer.status_code == status  # the page may read of either
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-expose-headers"] == "*"
    # No question, no answer.
    assert (await house.http.options("/v1/models", headers={"Origin": PAGE})).status_code == 401


@pytest.mark.parametrize(
    "other", [{"Origin": "https://evil.example"}, {"Access-Control-Request-Method": "PUT"}]
)
async def test_a_page_that_may_not_gets_our_error(houses: Houses, other: dict[str, str]) -> None:
    house = await houses.open(api_key=("key",), cors_origins=(PAGE,))
    answer = await house.http.options("/v1/models", headers=ASKING | other)
    assert answer.status_code == 403
    assert error_of(answer)["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in answer.headers
    plain = await house.http.get(
        "/v1/models", headers={"Authorization": "Bearer key", "Origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in plain.headers


async def test_a_proxy_may_take_its_path_off_or_not(houses: Houses) -> None:
    house = await houses.open(api_key=("key",), root_path="/apps/vision")
    key = {"Authorization": "Bearer key"}
    for path, status in (
        ("/apps/vision/live", 200),
        ("/live", 200),
        ("/apps/vision/v1/models/tiny", 401),
        ("/apps/visionary/live", 401),
    ):
        assert (await house.http.get(path)).status_code == status
    for path in ("/v1/models/tiny", "/apps/vision/v1/models/tiny"):
        assert (await house.http.get(path, headers=key)).status_code == 200
    assert (await house.http.get("/apps/vision/apps/vision/live", headers=key)).status_code == 404
    page = (await house.http.get("/apps/vision/openapi.json", headers=key)).json()
    assert page["servers"] == [{"url": "/apps/vision"}]
    assert "/v1/models" in page["paths"]


async def test_a_path_like_a_route_of_ours_can_be_the_proxys(houses: Houses) -> None:
    house = await houses.open(root_path="/v1")
    assert (await house.http.get("/v1/v1/models")).status_code == 200


async def sent(house: House, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes back for some bytes."""
    async with listening(house) as port, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
        writer.close()
    return int(head[0].split(" ")[1]), headers, body


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 70_000,
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    ],
    ids=["garbage", "length", "head", "proxy", "tls"],
)
async def test_what_is_no_http_gets_the_envelope_too(house: House, data: bytes) -> None:
    status, headers, body = await sent(house, data)
    assert status == 400
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_http"


async def test_head_is_get_without_a_body(houses: Houses) -> None:
    house = await houses.open(api_key=("key",))
    key = {"Authorization": "Bearer key"}
    async with (
        listening(house) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        for path, status in (
            ("/live", 200),
            ("/ready", 200),
            ("/health", 200),
            ("/metrics", 200),
            ("/version", 200),
            ("/v1/models", 200),
            ("/v1/models/tiny", 200),
            ("/v1/models/other", 404),
            ("/docs", 200),
            ("/openapi.json", 200),
            ("/nowhere", 404),
            ("/v1/chat/completions", 405),
        ):
            plain = await client.get(path, headers=key)
            # On the same connection: a body would be taken for the next answer's head.
            for _ in range(2):
                head = await client.head(path, headers=key)
                assert (head.status_code, head.content) == (status, b""), path
                same = ("content-type", "content-length", "allow")
                if path != "/metrics":
                    assert [head.headers.get(n) for n in same] == [
                        plain.headers.get(n) for n in same
                    ]
        assert (await client.head("/v1/models")).status_code == 401
        house.service.pause()
        assert (await client.head("/ready")).status_code == 503
        wrong = await client.put("/v1/models", headers=key)
        assert wrong.headers["allow"] == "GET, HEAD"


async def test_head_of_a_stream_does_not_follow_it(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.access")
    go_on = stuck(house.engine)
    body = {"messages": [{"role": "user", "content": "Hello!"}], "stream": True}
    body["stream_options"] = {"resumable": True}
    async with listening(house) as port, asyncio.timeout(60):
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60)
        async with client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
            place = answer.url.join(answer.headers["content-location"])
            head = await client.head(place)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-type"].startswith("text/event-stream")
            while not any(text.startswith("HEAD") for text in caplog.messages):
                await asyncio.sleep(0.01)
            go_on.set()
            assert (await answer.aread()).endswith(b"data: [DONE]\n\n")


async def test_options_without_cors_is_a_method_like_others(houses: Houses) -> None:
    open_house, locked = await houses.open(), await houses.open(api_key=("key",))
    for headers in ({}, ASKING):
        answer = await open_house.http.options("/v1/models", headers=headers)
        assert answer.status_code == 405
        assert answer.headers["allow"] == "GET, HEAD"
        assert error_of(answer)["code"] == "method_not_allowed"
        assert (await locked.http.options("/v1/models", headers=headers)).status_code == 401


async def test_no_page_without_an_origin_may_ask_unless_all_may(houses: Houses) -> None:
    named, all_ = await houses.open(cors_origins=(PAGE,)), await houses.open(cors_origins=("*",))
    asked = ASKING | {"Origin": "null"}
    assert (await named.http.options("/v1/messages", headers=asked)).status_code == 403
    answer = await all_.http.options("/v1/messages", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"messages": [{"role": "user", "content": "Hello!"}], "stream": true}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize(
    "headers",
    [
        LENGTH + b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\n" + LENGTH,
        LENGTH + LENGTH,
        LENGTH + b"Content-Length: 3\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding: \x0bchunked\r\n",
        b"Transfer-Encoding:\r\n chunked\r\n",
        b"Host: y\r\n" + LENGTH,
        b"A: b\nContent-Length: 0\r\n",
        b"A: \0\r\n",
    ],
)
async def test_what_a_proxy_may_read_otherwise_is_refused(house: House, headers: bytes) -> None:
    body = CHUNKED if b"chunked" in headers else BODY
    status, answer, text = await sent(house, CHAT + headers + b"\r\n" + body + b"GET /live")
    assert status == 400
    assert answer["connection"] == "close"
    assert len(answer["x-request-id"]) == 32
    assert json.loads(text)["error"]["code"] == "invalid_http"
    assert not house.engine.requests


@pytest.mark.parametrize(
    ("more", "begun"),
    [
        (b"GARBAGE\r\n\r\n", False),
        (b"GARBAGE\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 70_000, True),
    ],
)
async def test_nonsense_behind_a_request_does_not_become_a_part_of_its_answer(
    house: House, more: bytes, begun: bool
) -> None:
    stuck(house.engine)
    async with listening(house) as port, asyncio.timeout(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        asked = CHAT + LENGTH + b"\r\n" + BODY
        writer.write(asked if begun else asked + more)
        if begun:
            await reader.readuntil(b"Yes")
            writer.write(more)
        with contextlib.suppress(ConnectionError):
            assert b"HTTP/1.1 400" not in await reader.read()
        writer.transport.abort()
        await house.service.gate.idle.wait()


async def test_what_stands_behind_a_body_is_no_header(houses: Houses) -> None:
    house = await houses.open(api_key=("key",))
    trailers = b"Authorization: Bearer key\r\nX-Request-Id: behind\r\n\r\n"
    body = b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED[:-2] + trailers
    status, headers, _ = await sent(house, CHAT + body)
    assert status == 401
    assert headers["x-request-id"] != "behind"


async def test_nonsense_in_a_body_is_answered(house: House) -> None:
    body = b"Transfer-Encoding: chunked\r\n\r\n5\r\n{    \r\nxyz\r\n"
    status, _, text = await sent(house, CHAT + body)
    assert status == 400
    assert json.loads(text)["error"]["code"] == "invalid_http"


async def test_an_address_says_all_its_methods(house: House) -> None:
    for path, allowed in (
        ("/v1/responses/resp_x", "DELETE, GET, HEAD"),
        ("/v1/files", "GET, HEAD, POST"),
        ("/v1/messages", "POST"),
        ("/v1/models", "GET, HEAD"),
    ):
        answer = await house.http.patch(path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == allowed


async def test_a_body_is_taken_as_it_is(house: House) -> None:
    cases = (["gzip"], 415), (["br, gzip"], 415), (["identity", "gzip"], 415), (["identity"], 200)
    for codings, status in cases:
        headers = [("Content-Encoding", coding) for coding in codings]
        headers.append(("Content-Type", "application/json"))
        answer = await house.http.post("/v1/chat/completions", content=BODY, headers=headers)
        assert answer.status_code == status
    assert len(house.engine.requests) == 1
