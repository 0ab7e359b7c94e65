"""/server_info, /version and /docs."""

import dataclasses
import html.parser
import importlib.metadata
import re
from typing import Any

from server.app import create_app
from server.info import server_info
from server.openapi import ROUTES
from server.reference import STYLE, reference
from tests.api.conftest import House, Houses
from tests.fake_engine import FakeEngine, FakeMedia
from wire.settings import EngineSettings, MediaSettings, ServerSettings, Settings, each_setting

VOID = {"meta", "br", "link", "img", "input"}


async def test_the_info_tells_what_is_served_and_how(house: House) -> None:
    info = (await house.http.get("/server_info")).json()
    assert info["version"] == importlib.metadata.version("internvl-server")
    assert info["state"] == "ready"
    assert (info["model"]["name"], info["model"]["max_model_len"]) == ("tiny", 512)
    assert info["model"]["geometry"]["tokens_per_tile"] == 3
    assert info["engine"]["attention"] == "sdpa"
    assert info["versions"]["msgspec"] == importlib.metadata.version("msgspec")
    assert info["settings"].keys() == {field.name for _, field, _ in each_setting()}
    assert info["settings"]["max_images"] == 4
    assert info["settings"]["scheduling_policy"] == "fcfs"
    assert info["settings"]["strict_fields"] is False


async def test_the_info_is_there_before_the_model(houses: Houses) -> None:
    engine = FakeEngine()
    engine.load.clear()
    house = await houses.open(engine, wait=False)
    info = (await house.http.get("/server_info")).json()
    assert info["state"] == "starting"
    assert info["model"] is info["engine"] is None


async def test_no_text_that_an_operator_wrote_is_told() -> None:
    """A path, a proxy with its password, a key: whatever it is."""
    secret = "s3cret/path"
    groups: list[Any] = []
    for group in (ServerSettings, MediaSettings, EngineSettings):
        given: dict[str, Any] = {}
        for field in dataclasses.fields(group):
            if isinstance(field.default, str) and not field.metadata["choices"]:
                given[field.name] = secret
            elif field.default == () and "float" not in str(field.type):
                given[field.name] = (secret,)
        groups.append(given)
    server, media, engine = groups
    assert len(server) + len(media) + len(engine) > 10
    for name in ("api_keys_file", "admin_key_file", "tls_certificate", "tls_key", "root_path"):
        server.pop(name)  # read when the application is made
    settings = Settings(ServerSettings(**server), MediaSettings(**media), EngineSettings(**engine))
    app = create_app(settings, FakeEngine(), FakeMedia())
    info = server_info(app.state.service)
    assert info.settings["model"] == info.settings["api_key"] == "\N{HORIZONTAL ELLIPSIS}"
    assert "s3cret" not in repr(info)


class Page(html.parser.HTMLParser):
    """Tags that are open, anchors, links, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID | {"td", "th"}:
            self.open.append(tag)
        for name, value in attrs:
            assert name in {"lang", "charset", "name", "content", "href", "id", "class"}
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


async def test_the_page_has_every_route_and_every_field_and_loads_nothing(house: House) -> None:
    answer = await house.http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    described = (await house.http.get("/openapi.json")).json()
    page = Page(answer.text)
    assert not page.open
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "base", "form"})
    assert {link for link in page.links if not link.startswith("#")} == {"openapi.json"}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    for route in ROUTES:
        assert route.replace(" ", "") in page.text
    for name, schema in described["components"]["schemas"].items():
        assert f"schema-{name}" in page.ids
        section = answer.text.split(f'id="schema-{name}"')[1].split("</section>")[0]
        for field in schema.get("properties", {}):
            assert f"<code>{field}</code>" in section


async def test_the_page_keeps_to_its_policy(house: House) -> None:
    answer = await house.http.get("/docs")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "style=" not in answer.text
    assert not re.search(r"\son\w+=", answer.text)


def test_what_a_description_says_is_never_markup() -> None:
    evil = '<script>alert("1")</script>'
    schema = {"description": evil, "properties": {evil: {"enum": [evil], "default": evil}}}
    page = {
        "info": {"title": evil},
        "paths": {f"/{evil}": {"get": {"description": evil, "responses": {evil: {"content": {}}}}}},
        "components": {"schemas": {evil: schema}},
    }
    assert "<script" not in reference(page)
    assert not Page(reference(page)).open


async def test_with_keys_all_of_it_needs_one(houses: Houses) -> None:
    house = await houses.open(api_key=("one",))
    for path in ("/server_info", "/version", "/docs", "/openapi.json"):
        assert (await house.http.get(path)).status_code == 401
        good = await house.http.get(path, headers={"Authorization": "Bearer one"})
        assert good.status_code == 200
