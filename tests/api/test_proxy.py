"""Behind a proxy that keeps answers until it has more of them."""

import asyncio
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import House, Houses, listening
from tests.api.test_life import HELLO, stuck, within
from tests.nginx import Names, composed, found, serving
from tests.servers import free_port

# It packs what it sends, and keeps back what it packs unless it is told that this is a stream.
NGINX = """
daemon off; error_log stderr; pid {folder}/pid; worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log off; gzip on; gzip_proxied any; gzip_types text/event-stream;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{behind}; }} }}
}}
"""


pytestmark = pytest.mark.skipif(found() is None, reason="nginx is not installed")


@pytest.mark.parametrize("compose", [False, True])
async def test_events_arrive_one_by_one_through_nginx(
    houses: Houses, tmp_path: Path, compose: bool
) -> None:
    house = await houses.open()
    go_on = stuck(house.engine)
    port = free_port()
    async with listening(house) as behind:
        with closing(Names("127.0.0.1")) as names:
            text = NGINX.format(folder=tmp_path, port=port, behind=behind)
            if compose:
                text = composed(tmp_path, port, names.port, behind)
            with serving(tmp_path, port, text):
                url = f"http://127.0.0.1:{port}"
                async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                    while (await client.get("/live")).status_code != 200:
                        assert compose  # of a name that is being looked up
                    await streamed(client, go_on)


async def streamed(client: httpx.AsyncClient, go_on: asyncio.Event) -> None:
    asked = client.stream("POST", "/v1/chat/completions", json=HELLO | {"stream": True})
    async with asked as answer:
        data = ""
        pieces = answer.aiter_text()
        while "Yes" not in data:  # while the engine waits
            data += await within(anext(pieces))
        go_on.set()
        async for piece in pieces:
            data += piece
    assert data.endswith("data: [DONE]\n\n")


async def test_the_log_of_nginx_has_the_id_of_a_request_and_not_its_query(
    house: House, tmp_path: Path
) -> None:
    port = free_port()
    async with listening(house) as behind:
        with (
            closing(Names("127.0.0.1")) as names,
            serving(tmp_path, port, composed(tmp_path, port, names.port, behind)),
        ):
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                while (await client.get("/live")).status_code != 200:
                    pass
                given = {"X-Request-Id": "mine-1"}
                mine = await client.get("/v1/models?secret=1", headers=given)
                other = await client.get("/v1/models", headers={"X-Request-Id": "not one"})
                new = await client.get("/v1/models")
    assert mine.headers["x-request-id"] == "mine-1"
    log = (tmp_path / "access.log").read_text()
    for answer in (mine, other, new):
        assert f"id={answer.headers['x-request-id']}\n" in log
    assert "secret" not in log
    assert "not one" not in log
