"""Responses in the background, and streams of responses that are read again, through the official
client."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseItemList
from pydantic import TypeAdapter

from server.limits import KeyLimits
from tests.api.conftest import House, Houses, listening
from tests.api.test_life import within
from tests.api.test_responses import CALL, LOOK, OFFICIAL, PICTURE, ask, events
from tests.api.test_resume import in_two
from tests.fake_engine import FakeEngine, say
from tests.small_tokenizer import encode_rendered
from wire.errors import EngineFailed

ASK: Any = {"model": "tiny", "input": "Hello!", "background": True}


@contextlib.asynccontextmanager
async def client(house: House) -> AsyncIterator[AsyncOpenAI]:
    """One that reads streams while they come."""
    async with (
        listening(house) as port,
        AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0, timeout=60
        ) as sdk,
    ):
        yield sdk


async def over(house: House, name: str) -> Response:
    """The response when it is over, as a client that polls gets it."""
    async with asyncio.timeout(60):
        while True:
            found = await house.sdk.responses.retrieve(name)
            if found.status not in ("queued", "in_progress"):
                return found
            await asyncio.sleep(0.01)


async def test_it_is_answered_while_nobody_reads(houses: Houses) -> None:
    go_on = asyncio.Event()
    house = await houses.open(FakeEngine(script=in_two("Yes", go_on, " No")), resume_grace=0.05)
    first = await house.sdk.responses.create(**ASK)
    assert (first.status, first.background, first.output) == ("queued", True, [])
    async with asyncio.timeout(60):
        while (now := await house.sdk.responses.retrieve(first.id)).output_text != "Yes":
            await asyncio.sleep(0.01)
    assert now.status == "in_progress"
    await asyncio.sleep(0.1)  # longer than a stream that nobody reads
    assert not house.service.gate.idle.is_set()
    go_on.set()
    last = await over(house, first.id)
    Response.model_validate(last.model_dump(), strict=True)
    assert (last.status, last.output_text) == ("completed", "Yes No")
    assert last.usage is not None
    assert not house.engine.aborted
    await within(house.service.gate.idle.wait())
    house.engine.script = say("And?")
    goes_on = await ask(house, previous_response_id=first.id)
    assert goes_on.status_code == 200


async def test_leaving_its_stream_ends_nothing(houses: Houses) -> None:
    go_on = asyncio.Event()
    house = await houses.open(FakeEngine(script=in_two("Yes", go_on, " No")), resume_grace=0.05)
    async with client(house) as sdk:
        stream = await sdk.responses.create(**ASK, stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        (running,) = house.service.background._running.values()
        await asyncio.sleep(0.2)  # longer than a stream that nobody reads
        go_on.set()
        assert (await over(house, running.response.id)).output_text == "Yes No"


async def test_its_events_are_read_again_from_anywhere(houses: Houses) -> None:
    house = await houses.open(FakeEngine(script=say(f"I look.\n{CALL}")))
    asked: Any = ASK | {"tools": [LOOK]}
    found = events_of((await ask(house, **asked, stream=True)).text)
    for event in found:
        OFFICIAL.validate_python(event, strict=True)
    kinds = [event["type"] for event in found]
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    statuses = [event["response"]["status"] for event in (*found[:3], found[-1])]
    assert statuses == ["queued", "queued", "in_progress", "completed"]
    name = found[0]["response"]["id"]
    for after in range(-1, len(found) - 1):
        at = {"starting_after": after} if after >= 0 else {}
        stream = await house.sdk.responses.retrieve(name, stream=True, **at)
        again = [event async for event in stream]
        assert [event.to_dict() for event in again] == found[after + 1 :]
    async with house.sdk.responses.stream(response_id=name, starting_after=4) as stream:
        numbers = [event.sequence_number async for event in stream]
        final = await stream.get_final_response()
    assert numbers == list(range(5, len(found)))
    assert final.output_text == "I look."
    assert (await house.sdk.responses.retrieve(name)).to_dict() == found[-1]["response"]


def events_of(text: str) -> list[dict[str, Any]]:
    """Of a stream with numbers."""
    parts = [part.split("\n", 1) for part in text.split("\n\n")[:-1]]
    assert [number for number, _ in parts] == [f"id: {number}" for number in range(len(parts))]
    return events("".join(f"{rest}\n\n" for _, rest in parts))


async def test_one_that_is_not_asked_for_its_stream_can_be_streamed_too(houses: Houses) -> None:
    go_on = asyncio.Event()
    house = await houses.open(FakeEngine(script=in_two("Yes", go_on, " No")))
    texts = []
    async with client(house) as sdk:
        first = await sdk.responses.create(**ASK)
        async for event in await sdk.responses.retrieve(first.id, stream=True):
            if event.type == "response.output_text.delta":
                go_on.set()
                texts.append(event.delta)
    assert "".join(texts) == "Yes No"


async def test_who_gives_way_to_other_readers_may_go_on_where_it_was(houses: Houses) -> None:
    go_on = asyncio.Event()
    house = await houses.open(FakeEngine(script=in_two("Yes", go_on, " No")))
    async with client(house) as sdk:
        name = (await sdk.responses.create(**ASK)).id

        async def read(after: int | None = None) -> list[Any]:
            at = {} if after is None else {"starting_after": after}
            stream = await sdk.responses.retrieve(name, stream=True, **at)
            return [event async for event in stream]

        first = asyncio.ensure_future(read())
        (recording,) = house.service.recordings._by_name.values()
        others = []
        async with asyncio.timeout(60):
            for number in range(1, 5):
                while len(recording._readers) < number:
                    await asyncio.sleep(0.01)
                others.append(asyncio.ensure_future(read()))
        seen = await within(first)
        assert seen[-1].code == "superseded"
        assert seen[-1].sequence_number == seen[-2].sequence_number
        go_on.set()
        whole = await within(asyncio.gather(*others))
        rest = await read(seen[-1].sequence_number)
    assert whole == [seen[:-1] + rest] * 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_cancelling_ends_the_work_and_keeps_what_there_is(
    houses: Houses, stream: bool, begun: bool
) -> None:
    house = await houses.open(
        FakeEngine(script=in_two("Yes" if begun else "", asyncio.Event(), ""))
    )
    async with client(house) as sdk:
        asked = await sdk.responses.create(**ASK, stream=stream)
        last: Any = None
        if stream:
            async for event in asked:
                last = event
                if event.type == ("response.output_text.delta" if begun else "response.queued"):
                    break
            (running,) = house.service.background._running.values()
            name = running.response.id
        else:
            name = asked.id
            async with asyncio.timeout(60):
                while begun and not (await sdk.responses.retrieve(name)).output:
                    await asyncio.sleep(0.01)
        ended = await sdk.responses.cancel(name)
        assert ended.status == "cancelled"
        assert ended.output_text == ("Yes" if begun else "")
        assert {item.status for item in ended.output} <= {"incomplete"}
        if stream:
            async for event in asked:
                last = event
            assert last.type == "response.incomplete"
            assert last.response == ended
        assert house.engine.aborted or not begun
        assert await sdk.responses.cancel(name) == ended
        assert await sdk.responses.retrieve(name) == ended
    await within(house.service.gate.idle.wait())


async def test_only_what_is_in_the_background_is_cancelled(house: House) -> None:
    plain = await house.sdk.responses.create(model="tiny", input="Hello!")
    with pytest.raises(openai.BadRequestError) as caught:
        await house.sdk.responses.cancel(plain.id)
    assert caught.value.param == "response_id"
    with pytest.raises(openai.NotFoundError):
        await house.sdk.responses.cancel("resp_x")
    done = await house.sdk.responses.create(**ASK)
    done = await over(house, done.id)
    assert await house.sdk.responses.cancel(done.id) == done


async def test_deleting_one_that_runs_ends_it(houses: Houses) -> None:
    house = await houses.open(FakeEngine(script=in_two("Yes", asyncio.Event(), "")))
    first = await house.sdk.responses.create(**ASK)
    await house.sdk.responses.delete(first.id)
    for asked in ({}, {"stream": True}):
        with pytest.raises(openai.NotFoundError):
            await house.sdk.responses.retrieve(first.id, **asked)
    house.engine.script = say("Yes")
    first = await house.sdk.responses.create(**ASK)
    async with asyncio.timeout(60):
        while house.service.background._running:
            await asyncio.sleep(0.01)
    await house.sdk.responses.delete(first.id)
    await within(house.service.gate.idle.wait())
    assert house.service.responses.used == 0
    assert not house.service.recordings._by_name


async def test_a_failure_is_kept(houses: Houses) -> None:
    house = await houses.open(
        FakeEngine(script=lambda _: [encode_rendered("Yes"), EngineFailed("It failed.")])
    )
    first = await house.sdk.responses.create(**ASK)
    last = await over(house, first.id)
    assert last.status == "failed"
    assert last.error is not None
    assert (last.error.code, last.error.message) == ("server_error", "It failed.")
    stream = await house.sdk.responses.retrieve(first.id, stream=True)
    assert [event.type async for event in stream][-1] == "response.failed"


async def test_it_is_refused_like_any_other_request(houses: Houses) -> None:
    house = await houses.open()
    for wrong in ({"max_output_tokens": 4000}, {"store": False}, {"tool_choice": "required"}):
        assert (await ask(house, **ASK | wrong)).status_code == 400
    assert not house.engine.requests
    assert house.service.gate.idle.is_set()
    house = await houses.open(response_store_bytes=0)
    answer = await ask(house, **ASK)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "background"
    assert not house.engine.requests


async def test_it_holds_its_keys_place_until_it_is_over_and_is_cancelled_without_one(
    houses: Houses,
) -> None:
    house = await houses.open(
        FakeEngine(script=in_two("Yes", asyncio.Event(), "")), api_key=("one", "two")
    )
    mine, other = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    tenant = house.service.keys.find("one")
    assert tenant is not None
    tenant.account.limit(KeyLimits(max_concurrent_requests=1, tokens_per_minute=100))
    body = {"input": "Hello!", "background": True, "max_output_tokens": 20}

    async def send(method: str, path: str = "", headers: Any = mine, **options: Any) -> Any:
        return await house.http.request(method, f"/v1/responses{path}", headers=headers, **options)

    first = (await send("POST", json=body)).json()
    assert (await send("POST", json=body)).status_code == 429
    path = f"/{first['id']}"
    for method, below in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("GET", "/input_items"),
    ):
        assert (await send(method, path + below, other)).status_code == 404
    cancelled = await send("POST", f"{path}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    # What it would need beyond the limit of tokens is refused, not begun.
    longest = 100 - len(house.engine.requests[0].prompt)
    answer = await send("POST", json=body | {"max_output_tokens": longest})
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "tokens"
    assert not house.service.background._running


async def test_a_drain_waits_for_it_and_for_somebody_to_ask(houses: Houses) -> None:
    go_on = asyncio.Event()
    house = await houses.open(FakeEngine(script=in_two("Yes", go_on, " No")))
    first = await house.sdk.responses.create(**ASK)
    drained = asyncio.ensure_future(house.service.drain())
    await asyncio.sleep(0.1)
    assert not drained.done()
    go_on.set()
    assert (await over(house, first.id)).output_text == "Yes No"
    await within(drained)  # at once: nobody has to come back for it any more


async def test_a_stream_whose_events_are_not_kept_is_refused(house: House) -> None:
    plain = await house.sdk.responses.create(model="tiny", input="Hello!")
    with pytest.raises(openai.BadRequestError) as caught:
        await house.sdk.responses.retrieve(plain.id, stream=True)
    assert caught.value.param == "stream"
    done = await house.sdk.responses.create(**ASK)
    await over(house, done.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await house.sdk.responses.retrieve(done.id, stream=True, starting_after=99)
    assert caught.value.param == "starting_after"
    for wrong in ("-1", "x", ""):
        path = f"/v1/responses/{done.id}?stream=true&starting_after={wrong}"
        assert (await house.http.get(path)).json()["error"]["param"] == "starting_after"


async def test_the_items_of_a_response_are_listed_page_by_page(house: House) -> None:
    house.engine.script = say(f"I look.\n{CALL}")
    turn: Any = {"role": "user", "content": [PICTURE, {"type": "input_text", "text": "Look."}]}
    first: Any = await house.sdk.responses.create(
        model="tiny", input=[{"role": "developer", "content": "Be short."}, turn], tools=[LOOK]
    )
    call = first.output[1]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "a cup"}
    house.engine.script = say("A cup.")
    more: Any = [result, {"role": "assistant", "content": "So."}, {"role": "user", "content": "?"}]
    second = await house.sdk.responses.create(
        model="tiny", input=more, tools=[LOOK], previous_response_id=first.id
    )
    listing = house.sdk.responses.input_items.list
    whole = await listing(second.id, order="asc", limit=100)
    TypeAdapter(ResponseItemList).validate_python(whole.to_dict() | {"object": "list"})
    kinds = [(item.type, getattr(item, "role", None)) for item in whole.data]
    assert kinds == [
        ("message", "developer"),
        ("message", "user"),
        ("message", "assistant"),
        ("function_call", None),
        ("function_call_output", None),
        ("message", "assistant"),
        ("message", "user"),
    ]
    assert [item.id for item in whole.data[2:4]] == [item.id for item in first.output]
    assert not whole.has_more
    for order, expected in (("asc", whole.data), ("desc", whole.data[::-1])):
        paged = [item async for item in listing(second.id, order=order, limit=2)]  # type: ignore[arg-type]
        assert paged == expected
    own = [item async for item in listing(first.id, order="asc")]
    assert own == whole.data[:2]
    picture: Any = own[1]
    assert picture.content[0].image_url is None
    shown: Any = await listing(first.id, include=["message.input_image.image_url"])
    assert shown.data[0].content[0].image_url == PICTURE["image_url"]
    for wrong, param in (
        ({"after": "x"}, "after"),
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await listing(second.id, **wrong)
        assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        await listing("resp_x")
