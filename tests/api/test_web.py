"""The files of the chat page over HTTP."""

import re

import httpx
import pytest

from server.routes import web
from tests.api.conftest import House, Houses


@pytest.fixture
async def http(houses: Houses) -> httpx.AsyncClient:
    """Of a client without a key, where one is needed."""
    return (await houses.open(api_key=("secret",))).http


async def files(http: httpx.AsyncClient) -> list[str]:
    """All that the page and its modules name, relative to the page."""
    found = re.findall(r'(?:href|src)="(web/[^"]+)"', (await http.get("/")).text)
    folder = found[0].rsplit("/", 1)[0]
    for address in found:  # it grows
        text = (await http.get("/" + address)).text if address.endswith(".js") else ""
        named = re.findall(r"from '\./([\w.]+)'|\['([\w.]+\.png)'", text)
        found += [f for a, b in named if (f := f"{folder}/{a or b}") not in found]
    return found


async def test_the_page_and_all_its_files_are_there_without_a_key(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models")).status_code == 401
    named = await files(http)
    assert {each.rsplit("/", 1)[1] for each in named} == set(web._FILES)
    for address in ("", *named):
        answer = await http.get("/" + address)
        assert answer.status_code == 200
        assert answer.content
    on_disk = {file.name for file in web.FOLDER.iterdir()}
    assert on_disk == {*web._FILES, "index.html"}


async def test_nothing_inline_is_allowed_or_there(http: httpx.AsyncClient) -> None:
    answer = await http.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert not re.search(r"\sstyle=|\son\w+=|<style|<script(?![^>]*src=)|https?://", answer.text)


async def test_files_are_kept_for_good_under_their_own_address_only(
    http: httpx.AsyncClient,
) -> None:
    address = "/" + (await files(http))[-1]
    answer = await http.get(address)
    assert "immutable" in answer.headers["Cache-Control"]
    other = await http.get(address.replace(web.VERSION, "0" * 16))
    assert (other.status_code, other.content) == (200, answer.content)
    page = await http.get("/")
    assert other.headers["Cache-Control"] == page.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize("known", ["{}", 'W/{}, "x"', '"x", {}', "*"])
async def test_what_has_not_changed_is_not_sent_again(http: httpx.AsyncClient, known: str) -> None:
    tag = (await http.get("/")).headers["ETag"]
    again = await http.get("/", headers={"If-None-Match": known.replace("{}", tag)})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
    assert (await http.get("/", headers={"If-None-Match": '"other"'})).status_code == 200


async def test_head_tells_the_same_without_the_page(http: httpx.AsyncClient) -> None:
    whole, head = await http.get("/"), await http.head("/")
    assert head.status_code == 200
    assert not head.content
    for name in ("Content-Length", "Content-Type", "ETag", "Content-Security-Policy"):
        assert head.headers[name] == whole.headers[name]


@pytest.mark.parametrize(
    "path",
    ["index.html", "web.py", "..%2f..%2fsettings.py", "%2e%2e/app.py", "app.js/", "../app.py", ""],
)
async def test_no_other_file_can_be_named(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(f"/web/{web.VERSION}/{path}")
    assert answer.status_code == 404
    assert set(answer.json()) == {"error"}


async def test_the_page_is_only_read(house: House) -> None:
    assert (await house.http.post("/")).status_code == 405


async def test_a_server_can_be_without_the_page(houses: Houses) -> None:
    http = (await houses.open(chat_page=False, api_key=("secret",))).http
    for path in ("/", f"/web/{web.VERSION}/app.js"):
        assert (await http.get(path)).status_code == 401
        keyed = await http.get(path, headers={"Authorization": "Bearer secret"})
        assert keyed.status_code == 404


async def test_under_a_path_of_a_proxy_the_page_is_found_with_its_files(houses: Houses) -> None:
    http = (await houses.open(root_path="/vision")).http
    assert (await http.get("/vision/")).content == (await http.get("/")).content
    assert (await http.get(f"/vision/web/{web.VERSION}/app.js")).status_code == 200
