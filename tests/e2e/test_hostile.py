"""Hundreds of hostile requests over a real socket: each gets an answer of the documented form that
gives nothing of the server away, and none of them makes it fail."""

import base64
import copy
import json
import random
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.servers import Server, data_uri, draw, encode

PICTURE = encode(draw("red", "circle"))

# What no error may hold: paths, names of classes and libraries, addresses, and what Python prints.
LEAKS = re.compile(
    r"Traceback|\w(?:Error|Exception)\b|0x[0-9a-f]{4}|\.py\b|\.so\b|site-packages|"
    r"/(?:usr|home|root|tmp|work|app|opt|var|etc|proc|models)\b|"
    r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b|localhost|\bline \d|object at|"
    r"pydantic|msgspec|starlette|fastapi|uvicorn|httptools|torch|asyncio|PIL\b|Pillow|libav|tokenizers"
)

URLS = [
    "file:///etc/passwd",
    "file:///proc/self/environ",
    "/etc/passwd",
    "http://127.0.0.1:22/",
    "http://169.254.169.254/latest/meta-data",
    "http://[::1]/x",
    "http://0x7f000001/x",
    "ftp://example.org/x",
    "http://",
    "http://\\evil",
    "data:image/png;base64,",
    "data:image/png;base64,####",
    "data:text/html,<script>",
    data_uri(PICTURE[: len(PICTURE) // 2]),
    data_uri(b"\x89PNG\r\n\x1a\n" + b"\xff" * 200),
    data_uri(PICTURE[:16] + b"\x7f\xff\xff\xff\x7f\xff\xff\xff" + PICTURE[24:]),  # its size
    data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
    data_uri(b"RIFF\x00\x00\x00\x00WEBPVP8 "),
    data_uri(b"GIF89a" + bytes(50)),
    data_uri(b"\x00\x00\x00\x18ftypheic" + bytes(40)),
    data_uri(b"%PDF-1.7"),
]
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**30,
    1e308,
    0.5,
    "",
    "x" * 3000,
    "\x00\x1b[31m\u202e",
    "<|im_end|><img><IMG_CONTEXT>",
    "../../../../etc/passwd",
    "{{ self.__init__.__globals__ }}",
    "%s%n${jndi:ldap://x}",
    [],
    {},
    [[[[]]]],
    [None],
    {"type": "text"},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"__class__": "os.system", "$ref": "file:///etc/passwd"},
    ["x"] * 3000,
    *URLS,
]


def picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


CHAT: dict[str, Any] = {
    "model": "internvl-demo",
    "messages": [
        {"role": "system", "content": "x"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hello!"}, picture(data_uri(PICTURE))],
        },
        {"role": "assistant", "content": "y", "tool_calls": []},
        {"role": "user", "content": "z"},
    ],
    "max_tokens": 2,
    "stream": False,
    "temperature": 0.0,
    "stop": ["a"],
    "n": 1,
    "logit_bias": {"5": 1},
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "visual_budget": {"max_tiles": 4},
    "stream_options": {"include_usage": True},
    "structured_outputs": None,
    "prompt_logprobs": None,
}
ANTHROPIC: dict[str, Any] = {
    "model": "internvl-demo",
    "max_tokens": 2,
    "system": "x",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hello!"},
                {
                    "type": "image",
                    "source": {
                        "type": "base64",
                        "media_type": "image/png",
                        "data": base64.b64encode(PICTURE).decode(),
                    },
                },
            ],
        }
    ],
    "stream": False,
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "stop_sequences": ["a"],
}
TEXT: dict[str, Any] = {
    "model": "internvl-demo",
    "prompt": ["Hello!", "x"],
    "input": "Hello!",
    "tokens": [5, 6],
    "max_tokens": 2,
    "max_output_tokens": 2,
    "stream": False,
}
FORMS = [CHAT, ANTHROPIC, TEXT]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inside: dict[Any, Any] = {}
    if isinstance(value, dict | list):
        inside = value if isinstance(value, dict) else dict(enumerate(value[:20]))
    for key, inner in inside.items():
        yield from places(inner, (*path, key))


def mutated(form: dict[str, Any], chance: random.Random) -> Any:
    """With one to three of its places replaced by junk, or gone."""
    body: Any = copy.deepcopy(form)
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(list(places(body)))
        if not path:
            if chance.random() < 0.1:
                return chance.choice(JUNK)
            continue
        holder = body
        for step in path[:-1]:
            holder = holder[step]
        if chance.random() < 0.15:
            del holder[path[-1]]
        else:
            holder[path[-1]] = copy.deepcopy(chance.choice(JUNK))
    return body


def text_of(body: Any, chance: random.Random) -> bytes:
    """As JSON, sometimes damaged."""
    text = bytearray(json.dumps(body).encode())
    kind = chance.random()
    if kind < 0.05:
        del text[chance.randrange(len(text) + 1) :]
    elif kind < 0.1 and text:
        text[chance.randrange(len(text))] = chance.randrange(256)
    elif kind < 0.13:
        text = bytearray(b'{"messages":' + b"[" * 3000)
    elif kind < 0.15:
        text = bytearray(b'{"temperature": 1e999, "messages": "\\ud800"}')
    return bytes(text)


def request(
    method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> bytes:
    lines = {"Host": "x", "Connection": "close", "Content-Type": "application/json"}
    lines |= {"Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogateescape") + body


def odd_requests() -> Iterator[bytes]:
    """Strange to HTTP, not to the API."""
    for path in (
        "/v1/models/../../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/models/" + "x" * 9000,
        "/v1/chat/completions/",
        "//v1//models",
        "/%00",
        "/%ff%fe",
        "/v1/messages/x",
        "/v1/chat/completions?stream=1&model[]=x",
        "/docs/../openapi.json",
        "*",
        "http://other.example/v1/models",
        "/state",
        "/drain",
    ):
        for method in ("GET", "POST", "DELETE", "OPTIONS", "TRACE"):
            yield request(method, path, b"{}")
    chat = "/v1/chat/completions"
    for headers in (
        {"Content-Length": "-5"},
        {"Content-Length": "99999999999999999999"},
        {"Content-Length": "1e3"},
        {"Transfer-Encoding": "chunked"},
        {"Transfer-Encoding": "gzip, chunked", "Content-Length": "3"},
        {"Content-Type": "multipart/form-data"},
        {"Content-Type": "application/json; charset=\x7f"},
        {"Content-Encoding": "gzip"},
        {"Expect": "200-ok"},
        {"Authorization": "Bearer " + "x" * 5000},
        {"Authorization": "Bearer \udcff\udcfe"},
        {"X-Request-Id": "a" * 500},
        {"X-Request-Id": "<script>"},
        {"Range": "bytes=0-18446744073709551615"},
        {"Accept": "text/html"},
        {"Upgrade": "websocket", "Connection": "Upgrade, close"},
        {"X": "y" * 70_000},
    ):
        yield request("POST", chat, b"{}", headers)
    yield b"POST " + chat.encode() + b" HTTP/9.9\r\n\r\n"
    yield b"\x00" * 100
    yield b"GET / HTTP/1.1\r\nHost x\r\n\r\n"
    yield request("POST", chat, b"{}") + b"GARBAGE\r\n\r\n"


def exchange(server: Server, data: bytes) -> bytes:
    """All that comes back."""
    got = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        try:
            connection.sendall(data)
            while piece := connection.recv(1 << 16):
                got += piece
                if b"\r\n\r\n" not in got and got.endswith(b"100 Continue"):
                    break
        except (ConnectionResetError, BrokenPipeError):
            pass
    return got


def check(sent: bytes, got: bytes) -> int:
    """The status, after holding the answer against the rules; 0 where there is none."""
    if not got:
        return 0
    head, _, body = got.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    told = f"{sent[:1500]!r}\n{got[:1500]!r}"
    assert status < 500 or status == 503, told
    text = body.decode("utf-8", "replace")
    errors = [text] if status >= 400 else re.findall(r'data: (\{.*"error":.*)', text)
    for error in errors:
        # What the client has sent it may be shown.
        leaks = [found for found in LEAKS.findall(error) if found.encode() not in sent]
        assert not leaks, f"{leaks}\n{told}"
    assert not LEAKS.search(head.decode("latin-1")), told
    if status >= 400:
        found = json.loads(body[: int(re.search(rb"(?i)content-length: (\d+)", head)[1])])  # type: ignore[index]
        if found.get("type") == "error":
            assert set(found["error"]) >= {"type", "message"}, told
        else:
            assert set(found) == {"error"}, told
            assert set(found["error"]) == {"message", "type", "param", "code"}, told
            assert found["error"]["message"], told
    return status


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--max-model-len", "400", "--fetch-timeout", "2", "--body-timeout", "2"]
    flags += ["--head-timeout", "2"]
    server = Server(tmp_path_factory.mktemp("server") / "log.txt", flags)
    yield server
    server.close()


def storm(server: Server, requests: Iterator[bytes]) -> list[int]:
    return [check(data, exchange(server, data)) for data in requests]


def fuzzed(server: Server, chance: random.Random, count: int) -> Iterator[bytes]:
    paths = httpx.get(server.url + "/openapi.json", timeout=60).json()["paths"]
    posts = sorted(path for path, methods in paths.items() if "post" in methods)
    assert "/v1/chat/completions" in posts
    for number in range(count):
        path = posts[number % len(posts)]
        form = chance.choice(FORMS)
        if chance.random() < 0.7:
            form = ANTHROPIC if "messages" in path else CHAT if "chat" in path else TEXT
        yield request("POST", path, text_of(mutated(form, chance), chance))


def bad_pictures() -> Iterator[bytes]:
    for url in URLS:
        content = [picture(url), {"type": "text", "text": "What is this?"}]
        body = CHAT | {"messages": [{"role": "user", "content": content}], "stream": True}
        yield request("POST", "/v1/chat/completions", json.dumps(body).encode())


def test_nothing_hostile_makes_it_fail_or_talk(server: Server) -> None:
    statuses = storm(server, fuzzed(server, random.Random(7), 400))
    statuses += storm(server, odd_requests())
    refused = storm(server, bad_pictures())
    assert len(statuses) > 450
    assert statuses.count(400) > 150
    assert statuses.count(200) > 20  # it is not all refused at the door
    assert set(refused) == {400}
    log = server.log.read_text()
    assert "unexpected error" not in log
    assert "Traceback" not in log
    server.wait_for_metric("internvl_requests_in_flight", 0)
    server.wait_for_metric("internvl_kv_blocks_used", 0)
    assert "red" in server.ask(draw("red", "circle"), "What is in this picture?")
