"""DELETE /v1/requests/{name}: who may end what, and what the one who waits for it is told."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.api.conftest import House, Houses
from tests.api.test_chat import events, picture
from tests.api.test_errors import error_of
from tests.small_tokenizer import encode_rendered
from wire.errors import ServiceError
from wire.messages import EngineRequest

MINE = {"X-Request-Id": "mine"}
CHAT: Any = {"messages": [{"role": "user", "content": "Hello!"}]}


def endless(house: House) -> asyncio.Event:
    """Let the engine say something and never end; the event is set when it has."""
    said, never = asyncio.Event(), asyncio.Event()

    def script(request: EngineRequest) -> Any:
        yield encode_rendered("A")
        said.set()
        yield never

    house.engine.script = script
    return said


async def started(house: House, work: Callable[[], Any], until: asyncio.Event) -> Any:
    task = asyncio.ensure_future(work())
    await asyncio.wait_for(until.wait(), 60)
    return task


async def delete(house: House, name: str, key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return await house.http.delete(f"/v1/requests/{name}", headers=headers)


def asking(house: House, path: str, body: dict[str, Any], key: str = "") -> Callable[[], Any]:
    headers = MINE | ({"Authorization": f"Bearer {key}"} if key else {})
    return lambda: house.http.post(path, json=body, headers=headers)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"n": 3}),
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/completions", {"prompt": ["Hello", "you"], "n": 2}),
    ],
)
async def test_a_request_is_ended_whole_or_streamed(
    house: House, path: str, body: dict[str, Any]
) -> None:
    for stream in (False, True):
        said = endless(house)
        task = await started(house, asking(house, path, body | {"stream": stream}), said)
        answer = await delete(house, "mine")
        assert answer.status_code == 200
        assert answer.json() == {"id": "mine", "object": "request", "aborted": True}
        found = await asyncio.wait_for(task, 60)
        if stream:
            assert found.status_code == 200
            error = events(found.text)[-1]["error"]
        else:
            assert found.status_code == 499
            error = error_of(found)
        assert error["code"] == "request_aborted"
        assert (await delete(house, "mine")).status_code == 404
    assert set(house.engine.aborted) == {request.id for request in house.engine.requests}
    page = (await house.http.get("/metrics")).text
    assert "internvl_requests_in_flight 0.0" in page


async def test_it_has_the_name_of_its_answer_too(house: House) -> None:
    said = endless(house)
    task = await started(house, asking(house, "/v1/chat/completions", CHAT), said)
    (request,) = house.engine.requests
    assert request.id.startswith("chatcmpl-")
    assert (await delete(house, request.id)).status_code == 200
    assert (await task).status_code == 499


async def test_a_resumable_stream_is_ended_when_nobody_reads_it(house: House) -> None:
    said = endless(house)
    body = CHAT | {"stream": True, "stream_options": {"resumable": True}}
    task = await started(house, asking(house, "/v1/chat/completions", body), said)
    (request,) = house.engine.requests
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not house.engine.aborted
    assert (await delete(house, request.id)).status_code == 200
    read = await house.http.get(f"/v1/chat/completions/{request.id}/events")
    assert '"code":"request_aborted"' in read.text
    assert house.engine.aborted == [request.id]


async def test_one_that_waits_for_its_pictures_is_ended(house: House) -> None:
    house.media.gate.clear()
    arrived = asyncio.Event()
    arrive = house.media._arrive

    async def arriving(part: Any) -> None:
        arrived.set()
        await arrive(part)

    house.media._arrive = arriving  # type: ignore[method-assign]
    body = {"messages": [{"role": "user", "content": [picture("a")]}]}
    task = await started(house, asking(house, "/v1/chat/completions", body), arrived)
    assert (await delete(house, "mine")).status_code == 200
    assert (await asyncio.wait_for(task, 60)).status_code == 499
    assert house.media.cancelled == 1
    assert not house.engine.requests
    assert (await delete(house, "mine")).status_code == 404


async def test_nobody_ends_the_request_of_another_key(houses: Houses) -> None:
    house = await houses.open(api_key=("one", "two"))
    said = endless(house)
    task = await started(house, asking(house, "/v1/chat/completions", CHAT, "one"), said)
    (request,) = house.engine.requests
    for name in ("mine", request.id):
        other = await delete(house, name, "two")
        assert other.status_code == 404
        error = error_of(other)
        assert error["code"] == "request_not_found"
        assert other.content == (await delete(house, "nobodys", "two")).content
    assert (await delete(house, "mine")).status_code == 401
    assert not task.done()
    assert (await delete(house, "mine", "one")).status_code == 200
    assert (await task).status_code == 499


async def test_of_two_requests_of_one_name_both_are_ended_and_no_third(house: House) -> None:
    endless(house)
    ask = asking(house, "/v1/chat/completions", CHAT)
    tasks = [asyncio.ensure_future(ask()) for _ in range(2)]
    third = asyncio.ensure_future(
        house.http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "mine-1"})
    )
    while len(house.engine.requests) < 3:
        await asyncio.sleep(0)
    assert (await delete(house, "mine")).status_code == 200
    for task in tasks:
        assert (await asyncio.wait_for(task, 60)).status_code == 499
    assert not third.done()
    assert (await delete(house, "mine-1")).status_code == 200
    assert (await third).status_code == 499


async def test_what_has_ended_cannot_be_ended(house: House) -> None:
    answer = await asking(house, "/v1/chat/completions", CHAT)()
    refused = await asking(house, "/v1/chat/completions", CHAT | {"model": "other"})()
    assert (answer.status_code, refused.status_code) == (200, 404)
    for name in ("mine", answer.json()["id"]):
        assert (await delete(house, name)).status_code == 404


async def test_what_is_still_tidying_up_can_be_ended_again(house: House) -> None:
    """By its owner, and by an operator."""
    service, tidy = house.service, asyncio.Event()
    handle = service.handles.open(b"", "slow")

    async def work() -> None:
        async with service.preparing(), handle.preparing():
            try:
                await asyncio.Event().wait()
            finally:
                await tidy.wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    for _ in range(2):
        assert (await delete(house, "slow")).status_code == 200
    assert service.abort_all() == 1
    await asyncio.sleep(0)
    assert service.abort_all() == 0
    tidy.set()
    with pytest.raises(ServiceError):
        await task
