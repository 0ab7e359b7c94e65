"""Behind a proxy that keeps answers until it has more of them."""

from pathlib import Path

import httpx
import pytest

from tests.api.conftest import Houses, listening
from tests.api.test_life import HELLO, stuck, within
from tests.nginx import found, serving
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


@pytest.mark.skipif(found() is None, reason="nginx is not installed")
async def test_events_arrive_one_by_one_through_nginx(houses: Houses, tmp_path: Path) -> None:
    house = await houses.open()
    go_on = stuck(house.engine)
    port = free_port()
    async with listening(house) as behind:
        text = NGINX.format(folder=tmp_path, port=port, behind=behind)
        with serving(tmp_path, port, text):
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
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
