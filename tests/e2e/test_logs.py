"""What the logs of all processes say of a request, they say under its X-Request-Id."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.test_faults import House
from tests.servers import Server, data_uri, draw, encode

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello!"}], "ignore_eos": True}


FLAGS = ("--log-level", "debug", "--log-format", "json", "--num-kv-blocks", "14")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("faulty"), *FLAGS)
    yield house
    house.close()


@pytest.fixture
def server(house: House) -> Server:
    return house.server


def ask(server: Server, origin: str, **body: Any) -> str:
    """The answer's own id."""
    answer = httpx.post(
        server.url + CHAT, json=HELLO | body, headers={"X-Request-Id": origin}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-request-id"] == origin
    return str(answer.json()["id"])


def ask_together(server: Server, *origins: str, **body: Any) -> list[str]:
    with ThreadPoolExecutor(len(origins)) as pool:
        return list(pool.map(lambda origin: ask(server, origin, **body), origins))


def lines(server: Server) -> list[dict[str, str]]:
    """Each line of the log is one object, what the console says among them."""
    whole = server.log.read_text().rpartition("\n")[0]  # the last may be being written
    return [json.loads(line) for line in whole.splitlines()]


def logged(server: Server, true: Callable[[dict[str, str]], bool]) -> list[dict[str, str]]:
    """Such lines, when there are some: a line may come behind the answer."""
    end = time.monotonic() + 60
    while not (found := [line for line in lines(server) if true(line)]):
        assert time.monotonic() < end, lines(server)
        time.sleep(0.05)
    return found


def about(server: Server, name: str, what: str) -> list[dict[str, str]]:
    """The lines that name a request, when there is one of ``what``."""
    logged(server, lambda line: f"request={name} {what}" in line["message"])
    return [line for line in lines(server) if f"request={name} " in line["message"] + " "]


def test_every_line_about_a_request_has_its_id_and_no_other_line_has(server: Server) -> None:
    hostile = 'x"},{"level":"error\\u000a%s{0}'
    origins = ["first", "second", hostile]
    names = ask_together(server, *origins, max_tokens=20)
    for origin, name in zip(origins, names, strict=True):
        found = about(server, name, "ended how=length")
        assert {line["process"] for line in found} == {"engine"}
        assert {line["request_id"] for line in found} == {origin}
        (access,) = logged(
            server,
            lambda line, origin=origin: (
                line["request_id"] == origin and line["logger"] == "server.access"
            ),
        )
        assert "status=200" in access["message"]
        mine = [line for line in lines(server) if line["request_id"] == origin]
        assert {line["process"] for line in mine} == {"api", "engine"}
        others = [other for other in names if other != name]
        assert not [line for line in mine if any(other in line["message"] for other in others)]


def test_a_request_that_loses_its_memory_or_its_client_is_named(server: Server) -> None:
    squeezed = [f"squeezed-{i}" for i in range(3)]
    names = ask_together(server, *squeezed, max_tokens=170)
    taken = [line for line in lines(server) if " preempted " in line["message"]]
    assert taken
    origins = {f"request={name}": origin for name, origin in zip(names, squeezed, strict=True)}
    for line in taken:
        assert line["request_id"] == origins[line["message"].split()[0]]
    headers = {"X-Request-Id": "gone"}
    body = HELLO | {"stream": True, "max_tokens": 180}
    with httpx.stream("POST", server.url + CHAT, json=body, headers=headers, timeout=60) as answer:
        name = json.loads(next(answer.iter_lines())[6:])["id"]
    assert {line["request_id"] for line in about(server, name, "ended how=abort")} == {"gone"}


def test_what_an_engine_dies_of_and_what_its_successor_goes_on_with_is_named(
    house: House,
) -> None:
    server = house.server
    house.inject(how="raise", rows=2)
    names = ask_together(server, "survivor-a", "survivor-b", max_tokens=190)
    for origin, name in zip(("survivor-a", "survivor-b"), names, strict=True):
        found = about(server, name, "was being computed when the engine failed")
        assert {line["request_id"] for line in found} == {origin}
    went_on = [line for line in lines(server) if " goes on behind " in line["message"]]
    assert {line["request_id"] for line in went_on} <= {"survivor-a", "survivor-b"}
    assert went_on
    (failure,) = [line for line in lines(server) if line["message"] == "the engine fails"]
    assert "told to fail" in failure["exception"]


def test_a_decode_worker_that_died_is_named_with_the_request_that_met_it(server: Server) -> None:
    for pid in server.children("preprocessing.worker"):
        os.kill(pid, signal.SIGKILL)
    picture = {"type": "image_url", "image_url": {"url": data_uri(encode(draw("red", "circle")))}}
    ask(server, "picture", messages=[{"role": "user", "content": [picture]}], max_tokens=2)
    died = [line for line in lines(server) if "decode worker died" in line["message"]]
    assert died
    assert {line["request_id"] for line in died} == {"picture"}
