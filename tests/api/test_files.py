"""/v1/files: uploads, what is told of them, whose they are, and questions about them."""

import asyncio
import contextlib
import json
import weakref
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from anthropic.types import DeletedFile, FileMetadata
from openai.types import FileDeleted, FileObject

from preprocessing.budget import Budget
from preprocessing.media import File
from server.admission import FORM_BYTES
from server.files import OVERHEAD, FileStore
from tests.api.conftest import House, Houses, listening
from tests.api.test_life import within
from tests.api.test_tenants import as_, metric

DATA = b"a picture"
NOBODYS = "file-" + 40 * "0"
CLAUDE = {"anthropic-version": "2023-06-01"}


async def upload(
    house: House, data: bytes = DATA, name: str = "a.png", key: str = "", **fields: Any
) -> httpx.Response:
    form = {"purpose": "vision"} | fields
    headers = as_(key) if key else {}
    return await house.http.post(
        "/v1/files", files={"file": (name, data)}, data=form, headers=headers
    )


async def uploaded(house: House, data: bytes = DATA, key: str = "") -> str:
    answer = await upload(house, data, key=key)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def ask(house: House, *parts: Any, role: str = "user", **body: Any) -> httpx.Response:
    message = {"role": role, "content": [*parts, {"type": "text", "text": "What is it?"}]}
    return await house.ask(messages=[message], **body)


def error(answer: httpx.Response) -> tuple[int, str, str | None]:
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return answer.status_code, found["code"], found["param"]


# What is told


async def test_a_file_is_described_as_openai_does(house: House) -> None:
    answer = await upload(house, name="größe.png")
    assert answer.status_code == 200
    found = FileObject.model_validate(answer.json(), strict=True)
    assert (found.bytes, found.filename, found.purpose) == (len(DATA), "größe.png", "vision")
    assert (found.object, found.status) == ("file", "processed")
    assert found.expires_at == found.created_at + 86400
    again = await house.http.get(f"/v1/files/{found.id}")
    assert again.json() == answer.json()
    gone = await house.http.delete(f"/v1/files/{found.id}")
    assert FileDeleted.model_validate(gone.json(), strict=True).id == found.id
    for method, path in (
        ("GET", f"/v1/files/{found.id}"),
        ("GET", f"/v1/files/{found.id}/content"),
        ("DELETE", f"/v1/files/{found.id}"),
    ):
        answer = await house.http.request(method, path)
        assert error(answer) == (404, "file_not_found", "file_id")


async def test_anthropics_clients_are_told_in_their_own_form(house: House) -> None:
    answer = await house.http.post(
        "/v1/files",
        files={"file": ("a.png", DATA)},
        data={"expires_in_seconds": "3600"},
        headers=CLAUDE,
    )
    found = FileMetadata.model_validate(answer.json())
    assert (found.filename, found.mime_type, found.size_bytes) == ("a.png", "image/png", len(DATA))
    assert found.expires_at is not None
    assert (found.expires_at - found.created_at).total_seconds() == 3600
    assert found.created_at.utcoffset() is not None
    listed = await house.http.get("/v1/files", headers=CLAUDE)
    assert listed.json() == {
        "data": [answer.json()],
        "next_page": None,
        "has_more": False,
        "first_id": found.id,
        "last_id": found.id,
    }
    same = await house.http.get(f"/v1/files/{found.id}")  # the same file for both
    assert same.json()["purpose"] == "user_data"
    gone = await house.http.delete(f"/v1/files/{found.id}", headers=CLAUDE)
    assert DeletedFile.model_validate(gone.json(), strict=True).type == "file_deleted"
    missing = await house.http.get(f"/v1/files/{found.id}", headers=CLAUDE)
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found_error"


async def test_the_same_bytes_again_renew_what_is_known_of_them(house: House) -> None:
    first = (await upload(house, name="first.png")).json()
    second = (
        await upload(
            house,
            name="second.png",
            purpose="user_data",
            **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
        )
    ).json()
    assert second["id"] == first["id"]
    assert (second["filename"], second["purpose"]) == ("second.png", "user_data")
    assert second["expires_at"] == second["created_at"] + 3600
    listed = (await house.http.get("/v1/files")).json()
    assert listed["data"] == [second]


async def test_a_file_is_kept_no_longer_than_the_server_keeps_files(houses: Houses) -> None:
    house = await houses.open(file_ttl=60)
    long = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592000"}
    found = (await upload(house, **long)).json()
    assert found["expires_at"] <= found["created_at"] + 61


async def test_lists_go_page_by_page_in_either_order(house: House) -> None:
    names = [await uploaded(house, b"%d" % number) for number in range(5)]
    other = (await upload(house, b"other", purpose="user_data")).json()["id"]

    async def listed(**query: Any) -> Any:
        return (await house.http.get("/v1/files", params=query)).json()

    page = await listed()
    assert [one["id"] for one in page["data"]] == [other, *reversed(names)]
    assert (page["object"], page["has_more"]) == ("list", False)
    assert (page["first_id"], page["last_id"]) == (other, names[0])
    page = await listed(order="asc", limit=2)
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (names[:2], True)
    page = await listed(order="asc", limit=4, after=page["last_id"])
    assert [one["id"] for one in page["data"]] == [*names[2:], other]
    assert page["has_more"] is False
    page = await listed(purpose="user_data")
    assert [one["id"] for one in page["data"]] == [other]
    assert (await listed(purpose="assistants"))["data"] == []
    page = await listed(after=names[0])
    assert (page["data"], page["first_id"], page["last_id"]) == ([], None, None)
    answer = await house.http.get("/v1/files", params={"after": NOBODYS})
    assert error(answer) == (404, "file_not_found", "after")
    for name, wrong, allowed in (
        ("limit", 0, "at least 1"),
        ("limit", 10_001, "at most 10000"),
        ("limit", "x", "an integer"),
        ("order", "up", "'asc' or 'desc'"),
    ):
        answer = await house.http.get("/v1/files", params={name: wrong})
        assert error(answer) == (400, "invalid_value", name)
        assert allowed in answer.json()["error"]["message"]


async def test_who_deletes_what_a_page_lists_is_told_the_next_page(house: House) -> None:
    names = {await uploaded(house, b"%d" % number) for number in range(45)}
    seen = []
    query: dict[str, str] = {}
    while True:
        page = (await house.http.get("/v1/files", params=query, headers=CLAUDE)).json()
        for one in page["data"]:
            seen.append(one["id"])
            await house.http.delete(f"/v1/files/{one['id']}")
        if page["next_page"] is None:
            break
        query = {"page": page["next_page"]}
    assert len(seen) == 45
    assert set(seen) == names
    for wrong in ("", "x", "page_nan", "page_1e9", NOBODYS):
        answer = await house.http.get("/v1/files", params={"page": wrong})
        assert error(answer) == (400, "invalid_value", "page")


async def test_anthropics_earlier_clients_turn_pages_by_ids(house: House) -> None:
    names = [await uploaded(house, b"%d" % number) for number in range(5)][::-1]

    async def listed(**query: Any) -> Any:
        return (await house.http.get("/v1/files", params=query, headers=CLAUDE)).json()

    page = await listed(limit=3)
    assert (page["first_id"], page["last_id"], page["has_more"]) == (names[0], names[2], True)
    page = await listed(limit=3, after_id=page["last_id"])
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (names[3:], False)
    answer = await house.http.get("/v1/files", params={"before_id": names[0]})
    assert error(answer) == (400, "invalid_value", "before_id")


async def test_files_that_are_asked_for_by_id_come_on_one_page(house: House) -> None:
    names = [await uploaded(house, b"%d" % number) for number in range(25)]
    query = {"ids[]": [*names[1:], NOBODYS]}
    page = (await house.http.get("/v1/files", params=query, headers=CLAUDE)).json()
    assert [one["id"] for one in page["data"]] == names[:0:-1]
    assert page["next_page"] is None


async def test_the_content_comes_back_and_no_browser_shows_it(house: House) -> None:
    page = b"<script>alert(1)</script>" * 9000
    answer = await upload(house, page, name='"; filename="x.html')
    path = f"/v1/files/{answer.json()['id']}/content"
    found = await house.http.get(path)
    assert found.content == page
    assert found.headers["content-type"] == "application/octet-stream"
    assert found.headers["content-length"] == str(len(page))
    assert found.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in found.headers["content-security-policy"]
    disposition = found.headers["content-disposition"]
    assert disposition.startswith("attachment; filename*=UTF-8''")
    assert not set('";<>\r\n') & set(disposition.partition("''")[2])


# What is refused


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"purpose": "assistants"}, "purpose", "invalid_value"),
        ({"purpose": ""}, "purpose", "invalid_value"),
        ({"expires_after": "1"}, "expires_after", "invalid_value"),
        ({"expires_after[seconds]": "9"}, "expires_after.anchor", "missing_required_parameter"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "0"},
            "expires_after.seconds",
            "invalid_value",
        ),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "1e3"},
            "expires_after.seconds",
            "invalid_value",
        ),
        (
            {"expires_after[anchor]": "now", "expires_after[seconds]": "9"},
            "expires_after.anchor",
            "invalid_value",
        ),
    ],
)
async def test_a_wrong_field_is_named(
    house: House, fields: dict[str, str], param: str, code: str
) -> None:
    assert error(await upload(house, **fields)) == (400, code, param)
    assert (await house.http.get("/v1/files")).json()["data"] == []


async def test_a_form_lacks_nothing(house: House) -> None:
    answer = await house.http.post("/v1/files", files={"file": ("a.png", DATA)})
    assert error(answer) == (400, "missing_required_parameter", "purpose")
    answer = await house.http.post("/v1/files", files={"purpose": (None, "vision")})
    assert error(answer) == (400, "missing_required_parameter", "file")
    assert error(await upload(house, b"")) == (400, "invalid_value", "file")
    answer = await house.http.post("/v1/files", json={"purpose": "vision"})
    assert error(answer) == (415, "unsupported_media_type", None)
    answer = await house.http.post("/v1/files")
    assert error(answer) == (415, "unsupported_media_type", None)
    answer = await house.http.post(
        "/v1/files",
        files={"file": ("a.png", DATA)},
        data={"purpose": "vision"},
        headers={"Content-Encoding": "gzip"},
    )
    assert error(answer) == (415, "unsupported_media_type", None)
    assert "Content-Encoding" in answer.json()["error"]["message"]


async def test_unknown_fields_are_told_or_refused(houses: Houses) -> None:
    house = await houses.open()
    answer = await upload(house, colour="red")
    assert answer.headers["X-InternVL-Ignored-Fields"] == "colour"
    answer = await upload(house, **{"purpose[x]": "y", "file[x]": "y"})
    assert answer.headers["X-InternVL-Ignored-Fields"] == "purpose[x], file[x]"
    house = await houses.open(strict_fields=True)
    assert error(await upload(house, colour="red")) == (400, "unknown_parameter", "colour")


async def test_what_is_no_picture_and_no_video_is_refused_at_once(house: House) -> None:
    assert error(await upload(house, b"bad")) == (400, "unsupported_media", "file")
    assert house.service.files.count == 0
    assert await metric(house, 'internvl_media_rejected_total{reason="unsupported_media"}') == 1


async def test_a_page_of_another_origin_may_not_upload(houses: Houses) -> None:
    house = await houses.open(cors_origins=("https://chat.example",))
    form: Any = {"files": {"file": ("a.png", DATA)}, "data": {"purpose": "vision"}}
    for origin in ("https://evil.example", "null", ""):
        answer = await house.http.post("/v1/files", **form, headers={"Origin": origin})
        assert error(answer) == (403, "origin_not_allowed", None)
    answer = await house.http.post("/v1/files", **form, headers={"Origin": "https://chat.example"})
    assert answer.status_code == 200


async def test_a_file_that_is_too_large_is_refused_said_or_not(houses: Houses) -> None:
    house = await houses.open(max_file_bytes=2000, max_request_bytes=1024)
    assert (await upload(house, b"x" * 2000)).status_code == 200  # its own limit holds alone
    assert error(await upload(house, b"x" * 2001)) == (413, "request_too_large", "file")
    answer = await upload(house, b"x" * (2000 + FORM_BYTES))
    assert error(answer) == (413, "request_too_large", None)

    async def pieces() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        while True:
            yield b"x" * 500

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = await within(house.http.post("/v1/files", content=pieces(), headers=form))
    assert error(answer) == (413, "request_too_large", "file")
    house = await houses.open(file_store_bytes=OVERHEAD + 10)
    assert (await upload(house, b"x" * 10)).status_code == 200
    assert error(await upload(house, b"x" * 11)) == (413, "request_too_large", "file")
    house = await houses.open(file_store_bytes=0)
    assert error(await upload(house, b"x")) == (413, "request_too_large", "file")


async def test_uploads_on_their_way_share_their_room(house: House) -> None:
    house.media.room = Budget(150)
    house.media.gate.clear()
    first = asyncio.create_task(upload(house, b"a" * 100))
    async with asyncio.timeout(60):
        while house.media.room.used < 100:
            await asyncio.sleep(0)
    answer = await upload(house, b"b" * 100)
    assert error(answer) == (503, "unavailable", None)
    assert answer.headers["retry-after"] == "10"
    house.media.gate.set()
    assert (await first).status_code == 200
    assert house.media.room.used == 0
    assert (await upload(house, b"b" * 100)).status_code == 200


@contextlib.asynccontextmanager
async def half_sent(port: int) -> AsyncIterator[asyncio.StreamReader]:
    """A connection that has sent half of a file."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    body = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + b"x" * 1000
    writer.write(b"%x\r\n%b\r\n" % (len(body), body))
    yield reader
    writer.close()


async def test_a_client_that_leaves_half_way_leaves_nothing(house: House) -> None:
    async with listening(house) as port:
        async with half_sent(port), asyncio.timeout(60):
            while house.media.room.used < 900:
                await asyncio.sleep(0.01)
            assert not house.service.gate.idle.is_set()
        await within(house.service.gate.idle.wait())
    assert house.media.room.used == house.service.files.count == 0


async def test_an_upload_that_stops_is_408_and_leaves_nothing(houses: Houses) -> None:
    house = await houses.open(body_timeout=0.3)
    async with listening(house) as port, half_sent(port) as reader:
        answer = await within(reader.read())
        assert answer.startswith(b"HTTP/1.1 408 ")
        await within(house.service.gate.idle.wait())
    assert house.media.room.used == house.service.files.count == 0


async def test_a_client_that_does_not_wait_leaves_nothing(house: House) -> None:
    house.media.gate.clear()
    async with listening(house) as port:
        with pytest.raises(httpx.ReadTimeout):
            async with httpx.AsyncClient(timeout=httpx.Timeout(60, read=0.3)) as client:
                await client.post(
                    f"http://127.0.0.1:{port}/v1/files",
                    files={"file": ("a.png", DATA)},
                    data={"purpose": "vision"},
                )
        await within(house.service.gate.idle.wait())
    assert house.media.room.used == house.service.files.count == 0


async def test_a_server_that_drains_takes_no_files_and_still_gives_those_it_has(
    house: House,
) -> None:
    name = await uploaded(house)
    house.service.pause()
    answer = await upload(house)
    assert error(answer) == (503, "unavailable", None)
    assert (await house.http.get(f"/v1/files/{name}/content")).content == DATA
    assert (await house.http.delete(f"/v1/files/{name}")).status_code == 200


async def test_flushing_caches_drops_no_file(house: House) -> None:
    name = await uploaded(house)
    house.service.flush()
    assert (await house.http.get(f"/v1/files/{name}")).status_code == 200


async def test_a_file_ends_with_its_time_though_nobody_asks(house: House) -> None:
    over = asyncio.Event()
    now = [0.0]
    store = FileStore(1 << 20, 100, lambda _: over.set(), lambda: now[0])
    house.service.files = store
    await uploaded(house)
    now[0] = 100
    await within(over.wait())
    assert store.used == 0


async def test_files_and_their_ends_are_counted(houses: Houses) -> None:
    house = await houses.open(file_store_bytes=2 * OVERHEAD + 20)
    for number in range(3):
        await uploaded(house, b"%010d" % number)
    assert await metric(house, "internvl_files") == 2
    assert await metric(house, "internvl_file_store_bytes") == 2 * OVERHEAD + 20
    assert await metric(house, 'internvl_files_evicted_total{reason="room"}') == 1


# Whose they are


async def test_a_key_finds_its_own_files_only(houses: Houses) -> None:
    house = await houses.open(api_key=("one", "two"))
    mine, yours = [await uploaded(house, key=key) for key in ("one", "two")]
    assert mine != yours
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        for name in (yours, NOBODYS, "x", "file-"):
            answer = await house.http.request(method, f"/v1/files/{name}{path}", headers=as_("one"))
            assert error(answer) == (404, "file_not_found", "file_id")
            assert "such file" in answer.json()["error"]["message"]
    listed = (await house.http.get("/v1/files", headers=as_("one"))).json()
    assert [one["id"] for one in listed["data"]] == [mine]
    part = {"type": "image_url", "image_url": yours}
    body = {"messages": [{"role": "user", "content": [part]}]}
    answer = await house.http.post("/v1/chat/completions", json=body, headers=as_("one"))
    assert error(answer)[:2] == (404, "file_not_found")
    assert (await house.http.delete(f"/v1/files/{mine}", headers=as_("one"))).status_code == 200
    found = await house.http.get(f"/v1/files/{yours}/content", headers=as_("two"))
    assert found.content == DATA
    assert (await house.http.get("/v1/files")).status_code == 401
    assert (await upload(house)).status_code == 401


async def test_an_upload_is_a_request_of_its_keys_limit(houses: Houses, tmp_path: Any) -> None:
    from server.keys import new_key

    key, entry = new_key("app")
    file = tmp_path / "keys.toml"
    file.write_text(entry + "requests_per_minute = 1\n")
    house = await houses.open(api_keys_file=str(file))
    answer = await upload(house, key=key)
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert error(await upload(house, key=key))[:2] == (429, "rate_limit_exceeded")


# Questions about them


def shown(house: House) -> list[Any]:
    return [part.url for part in house.media.parts]


async def test_every_way_to_name_a_picture_shows_its_bytes(house: House) -> None:
    name = await uploaded(house)
    ways: list[Any] = [
        {"type": "image_url", "image_url": name},
        {"type": "image_url", "image_url": {"url": name, "detail": "low"}},
        {"type": "file", "file": {"file_id": name}},
        {"type": "file", "file": {"file_id": name, "detail": "low", "filename": "a.png"}},
    ]
    for way in ways:
        for role in ("user", "tool"):
            house.media.parts.clear()
            answer = await ask(house, way, role=role)
            assert answer.status_code == 200, answer.text
            (found,) = shown(house)
            assert isinstance(found, File)
            assert found.data == DATA
            wanted = 1 if "low" in json.dumps(way) else None
            assert house.media.parts[0].max_tiles == wanted


async def test_a_file_is_a_picture_or_a_video_as_it_says_itself(house: House) -> None:
    name = await uploaded(house, b"film")
    for way in (
        {"type": "video_url", "video_url": {"url": name, "num_frames": 3}},
        {"type": "file", "file": {"file_id": name, "max_tiles": 2}},
    ):
        house.media.parts.clear()
        answer = await ask(house, way)
        assert answer.status_code == 200, answer.text
        assert [part.kind for part in house.media.parts] == ["video"]
        assert answer.json()["usage"]["internvl"]["videos"]
    answer = await ask(house, {"type": "file", "file": {"file_id": name}}, role="tool")
    assert error(answer) == (400, "invalid_value", "messages[0].content[0].file.file_id")


async def test_frames_may_be_files(house: House) -> None:
    names = [await uploaded(house, b"%d" % number) for number in range(2)]
    frames = {"type": "video_url", "video_url": {"frames": [names[0], "data:x", names[1]]}}
    answer = await ask(house, frames)
    assert answer.status_code == 200, answer.text
    first, second, third = shown(house)[0]
    assert (first.data, second, third.data) == (b"0", "data:x", b"1")
    frames["video_url"]["frames"][2] = NOBODYS
    answer = await ask(house, frames)
    assert error(answer) == (
        404,
        "file_not_found",
        "messages[0].content[0].video_url.frames[2]",
    )


def anthropic(source: Any) -> Any:
    block = {"type": "image", "source": source}
    return {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": [block]}]}


def responses(part: Any) -> Any:
    return {"model": "tiny", "input": [{"role": "user", "content": [part]}]}


def chat(part: Any) -> Any:
    return {"messages": [{"role": "user", "content": [part]}]}


def every_dialect(name: str) -> list[tuple[str, Any, str]]:
    """Route, body, and where the file is named."""
    named = {"type": "image_url", "image_url": {"url": name}}
    first = "messages[0].content[0]"
    return [
        *(
            (route, chat(named), f"{first}.image_url.url")
            for route in (
                "/v1/chat/completions",
                "/v1/chat/completions/render",
                "/v1/internvl/preview",
                "/tokenize",
            )
        ),
        (
            "/v1/chat/completions",
            chat({"type": "file", "file": {"file_id": name}}),
            f"{first}.file.file_id",
        ),
        (
            "/v1/responses",
            responses({"type": "input_image", "file_id": name}),
            "input[0].content[0].file_id",
        ),
        (
            "/v1/responses",
            responses({"type": "input_file", "file_id": name}),
            "input[0].content[0].file_id",
        ),
        (
            "/v1/responses",
            responses({"type": "input_image", "image_url": name}),
            "input[0].content[0].image_url",
        ),
        (
            "/v1/responses/input_tokens",
            responses({"type": "input_image", "file_id": name}),
            "input[0].content[0].file_id",
        ),
        ("/v1/messages", anthropic({"type": "file", "file_id": name}), f"{first}.source.file_id"),
        (
            "/v1/messages/count_tokens",
            anthropic({"type": "file", "file_id": name}),
            f"{first}.source.file_id",
        ),
        ("/v1/messages", anthropic({"type": "url", "url": name}), f"{first}.source.url"),
    ]


ROUTES = range(len(every_dialect("")))


@pytest.mark.parametrize("at", ROUTES)
async def test_every_dialect_shows_files_and_names_those_that_are_not_there(
    house: House, at: int
) -> None:
    name = await uploaded(house)
    route, body, _ = every_dialect(name)[at]
    answer = await house.http.post(route, json=body)
    assert answer.status_code == 200, answer.text
    (found,) = shown(house)
    assert found == File(DATA, found.digest)
    assert found.data == DATA
    route, body, where = every_dialect(NOBODYS)[at]
    answer = await house.http.post(route, json=body)
    assert answer.status_code == 404
    found = answer.json()["error"]
    told = found["details"] if route.startswith("/v1/messages") else found
    assert (told.get("code") or told["error_code"], told["param"]) == ("file_not_found", where)
    assert found["message"] == f"{where}: there is no such file (any more); upload it again."


@pytest.mark.parametrize("name", ["https://x.example/a.png", "file:///etc/passwd", "data:x", "x"])
async def test_what_stands_for_an_id_is_never_a_url(house: House, name: str) -> None:
    for route, body, _ in every_dialect(name):
        if "file_id" in json.dumps(body):
            answer = await house.http.post(route, json=body)
            assert answer.status_code == 404
    assert shown(house) == []


async def test_a_part_has_one_source(house: House) -> None:
    for part in (
        {"type": "input_image"},
        {"type": "input_image", "image_url": "data:x", "file_id": NOBODYS},
        {"type": "input_file"},
        {"type": "input_file", "file_id": NOBODYS, "file_data": "x"},
        {"type": "input_file", "file_url": "https://x.example/a.png"},
    ):
        answer = await house.http.post("/v1/responses", json=responses(part))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("input[0].content[0]")
    for file in ({}, {"file_id": ""}, {"file_id": NOBODYS, "file_data": "x"}, "x", None):
        answer = await house.http.post(
            "/v1/chat/completions", json=chat({"type": "file", "file": file})
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("messages[0].content[0].file")


async def test_a_conversation_that_is_gone_on_with_needs_its_files(house: House) -> None:
    name = await uploaded(house)
    body = responses({"type": "input_file", "file_id": name})
    first = (await house.http.post("/v1/responses", json=body)).json()["id"]
    more = {"model": "tiny", "input": "And?", "previous_response_id": first}
    assert (await house.http.post("/v1/responses", json=more)).status_code == 200
    await house.http.delete(f"/v1/files/{name}")
    answer = await house.http.post("/v1/responses", json=more)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "file_not_found"
    assert answer.json()["error"]["param"].startswith("previous_response_id")
    assert await uploaded(house) == name  # and all is well again
    assert (await house.http.post("/v1/responses", json=more)).status_code == 200


async def test_a_file_that_is_deleted_while_it_is_shown_is_shown(house: House) -> None:
    name = await uploaded(house)
    house.media.gate.clear()
    asking = asyncio.create_task(ask(house, {"type": "image_url", "image_url": name}))
    async with asyncio.timeout(60):
        while not house.media.parts:
            await asyncio.sleep(0)
    assert (await house.http.delete(f"/v1/files/{name}")).status_code == 200
    house.media.gate.set()
    assert (await asking).status_code == 200
    answer = await ask(house, {"type": "image_url", "image_url": name})
    assert error(answer) == (404, "file_not_found", "messages[0].content[0].image_url.url")


async def test_a_download_ends_and_keeps_nothing_when_its_file_is_deleted(house: House) -> None:
    data = bytes(range(256)) * (1 << 16)  # more than any buffer on the way takes
    house.media.room = Budget(1 << 25)
    async with listening(house) as port:
        name = await uploaded(house, data)
        upload = house.service.files.get(b"", name)
        assert upload is not None
        file = weakref.ref(upload.file)
        del upload
        async with (
            httpx.AsyncClient(timeout=60) as client,
            client.stream("GET", f"http://127.0.0.1:{port}/v1/files/{name}/content") as answer,
        ):
            pieces = answer.aiter_bytes()
            assert data.startswith(await anext(pieces))
            assert (await house.http.delete(f"/v1/files/{name}")).status_code == 200
            assert file() is None  # though nobody reads on
            with pytest.raises(httpx.RemoteProtocolError):
                assert len([piece async for piece in pieces]) < len(data)


async def test_many_at_once_upload_ask_and_delete(houses: Houses) -> None:
    house = await houses.open(file_store_bytes=6 * (OVERHEAD + 10))

    async def client(number: int) -> set[int]:
        seen = set()
        for turn in range(6):
            data = b"%010d" % ((number + turn) % 8)
            name = await uploaded(house, data)
            answer = await ask(house, {"type": "image_url", "image_url": name})
            seen.add(answer.status_code)
            if turn % 3 == 0:
                seen.add((await house.http.delete(f"/v1/files/{name}")).status_code)
        return seen

    seen = set.union(*await asyncio.gather(*(client(number) for number in range(12))))
    assert 200 in seen <= {200, 404}
    assert house.service.files.used <= 6 * (OVERHEAD + 10)
    assert house.media.room.used == 0
