"""What operators may do, with a scripted engine."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from server.admin import Admin
from server.keys import Keys, fingerprint
from tests.api.conftest import House, Houses
from tests.api.test_errors import error_of
from tests.api.test_life import within
from tests.api.test_tenants import as_, ask_as, send, silent

ACTIONS = {
    "GET": ("/state", "/keys", "/metrics"),
    "POST": ("/drain", "/resume", "/abort", "/cache/flush", "/log-level", "/profile"),
}


@contextlib.asynccontextmanager
async def operator(house: House, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    file = folder / "admin.toml"
    file.write_text(f'[keys.ops]\nsha256 = "{fingerprint("admin").hex()}"\n')
    transport = httpx.ASGITransport(Admin(house.service, Keys(str(file))).app)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://admin", headers=as_("admin")
    ) as client:
        yield client


async def test_every_action_needs_the_operators_key_and_none_is_public(
    houses: Houses, tmp_path: Path
) -> None:
    house = await houses.open(api_key=("client",))
    async with operator(house, tmp_path) as admin:
        for method, paths in ACTIONS.items():
            for path in paths:
                for headers in (as_("client"), as_(""), {"Authorization": ""}):
                    refused = await admin.request(method, path, headers=headers)
                    assert refused.status_code == 401
                    assert error_of(refused)["code"] == "invalid_api_key"
                if path == "/metrics":
                    continue
                for key in ("client", "admin"):
                    public = await house.http.request(method, path, headers=as_(key))
                    assert public.status_code == (404 if key == "client" else 401)
        assert (await admin.get("/live")).status_code == 404
        assert error_of(await admin.get("/drain"))["code"] == "method_not_allowed"
    assert not house.engine.flushed


async def test_the_use_of_keys_stands_on_one_port_alone(houses: Houses, tmp_path: Path) -> None:
    for port in (0, 9001):
        house = await houses.open(api_key=("client", "other"), admin_port=port)
        public = await house.http.get("/metrics", headers=as_("client"))
        async with operator(house, tmp_path) as admin:
            private = await admin.get("/metrics")
        assert ("internvl_key_" in public.text) == (port == 0)
        assert 'internvl_key_requests_total{key="api-key-2"} 0.0' in private.text
        assert "internvl_requests_in_flight" in public.text


async def test_a_drain_takes_no_new_work_and_can_be_taken_back(
    houses: Houses, tmp_path: Path
) -> None:
    house = await houses.open()
    go_on = silent(house.engine)
    asked = await send(house, 2)
    async with operator(house, tmp_path) as admin:
        state = (await admin.post("/drain")).json()
        assert (state["state"], state["requests_in_flight"]) == ("draining", 2)
        refused = await house.ask()
        assert refused.status_code == 503
        assert "an operator" in error_of(refused)["message"]
        assert refused.headers["retry-after"]
        assert (await house.http.get("/ready")).status_code == 503
        assert (await house.http.get("/live")).status_code == 200
        go_on.set()
        for answer in await within(asyncio.gather(*asked)):
            assert answer.status_code == 200
        assert (await admin.get("/state")).json()["requests_in_flight"] == 0
        assert (await admin.post("/resume")).json()["state"] == "ready"
        assert (await house.ask()).status_code == 200
        assert (await house.http.get("/ready")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_all_requests_are_ended_with_an_error_of_their_own(
    houses: Houses, tmp_path: Path, stream: bool
) -> None:
    house = await houses.open()
    silent(house.engine)
    asked = await send(house, 2, stream=stream)
    house.media.gate.clear()  # one whose picture is being fetched
    content = [{"type": "image_url", "image_url": "data:x"}]
    messages = [{"role": "user", "content": content}]
    asked.append(asyncio.create_task(house.ask(messages=messages, stream=stream)))
    async with asyncio.timeout(60):
        while not house.media.parts:
            await asyncio.sleep(0)
    async with operator(house, tmp_path) as admin:
        assert (await admin.post("/abort")).json() == {"aborted": 3}
        for answer in await within(asyncio.gather(*asked)):
            assert answer.status_code == 503
            assert error_of(answer)["code"] == "aborted_by_operator"
    assert house.service.gate.idle.is_set()
    house.media.gate.set()


async def test_caches_are_flushed_and_the_level_is_set_everywhere(
    houses: Houses, tmp_path: Path
) -> None:
    house = await houses.open()
    before = logging.getLogger().level
    async with operator(house, tmp_path) as admin:
        assert (await admin.post("/cache/flush")).status_code == 200
        assert (house.engine.flushed, house.media.forgotten) == (1, 1)
        try:
            answer = await admin.post("/log-level?level=error")
            assert answer.json()["log_level"] == "error"
            assert logging.getLogger().level == logging.ERROR
            assert house.engine.level == "error"
            for query in ("", "?level=loud", "?level=DEBUG"):
                wrong = await admin.post(f"/log-level{query}")
                assert wrong.status_code == 400
                assert error_of(wrong)["param"] == "level"
        finally:
            logging.getLogger().setLevel(before)


async def test_a_profile_names_what_was_called_meanwhile(
    houses: Houses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await houses.open()
    slept, over = [], asyncio.Event()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await over.wait()

    monkeypatch.setattr("server.admin.asyncio", SimpleNamespace(sleep=sleep))
    async with operator(house, tmp_path) as admin:
        taken = asyncio.create_task(admin.post("/profile?seconds=0.3"))
        assert (await house.ask()).status_code == 200
        second = await admin.post("/profile?seconds=0.01")
        assert second.status_code == 409
        assert error_of(second)["code"] == "profile_running"
        assert not taken.done()
        over.set()
        page = (await taken).text
        assert "prepare.py" in page
        answer = await admin.post("/profile?seconds=2&of=engine")
        assert answer.text == "2.0 seconds of a script's engine"
        answer = await admin.post("/profile?seconds=2&of=model")
        assert answer.text == "2.0 seconds of a script's model"
        assert answer.headers["content-type"] == "application/gzip"
        assert (await admin.post("/profile?of=disk")).status_code == 400
        for wrong in ("0", "61", "nan", "-1", "soon", ""):
            assert (await admin.post(f"/profile?seconds={wrong}")).status_code == 400
        assert (await admin.post("/profile?seconds=0.01")).status_code == 200
    assert slept == [0.3, 0.01]


async def test_operators_see_what_each_key_has_used(houses: Houses, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        f'[keys.alice]\nsha256 = "{fingerprint("alice").hex()}"\nrequests_per_minute = 5\n'
    )
    house = await houses.open(api_keys_file=str(file))
    await ask_as(house, "alice")
    async with operator(house, tmp_path) as admin:
        page = await admin.get("/keys")
        (alice,) = page.json()["keys"]
        assert alice["name"] == "alice"
        assert alice["limits"]["requests_per_minute"] == 5
        assert alice["used"]["requests"] == 1
        assert alice["used"]["completion_tokens"] > 0
        assert alice["left"]["x-ratelimit-remaining-requests"] == "4"
        assert fingerprint("alice").hex() not in page.text
        assert 'key="alice"' in (await admin.get("/metrics")).text
