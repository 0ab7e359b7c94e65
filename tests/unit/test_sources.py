"""One fetcher, real sockets: what is fetched, what is refused, and what a refusal gives away."""

import asyncio
import base64
import socket
import threading
from pathlib import Path
from typing import Any, get_args

import pytest

from preprocessing import sources
from preprocessing.allowance import Allowance
from preprocessing.media import File, Kind
from preprocessing.sources import Fetcher
from tests.sites import (
    BODY,
    OPEN,
    PARAM,
    Site,
    answer,
    certified,
    fetch,
    needs_openssl,
    redirect,
    refusal,
)
from wire.errors import MediaRefused
from wire.settings import MediaSettings, SettingError

# data: URLs


@pytest.mark.parametrize(
    "head",
    ["data:image/png;base64,", "DATA:IMAGE/JPEG;BASE64,", "data:application/octet-stream;base64,",
     "data:image/svg+xml;base64,"],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 2, 3, 1000])
async def test_a_data_url_gives_its_bytes(head: str, size: int) -> None:
    assert await fetch(head + base64.b64encode(BODY[:size]).decode()) == BODY[:size]


@pytest.mark.parametrize(
    "head",
    ["data:video/mp4;base64,", "DATA:VIDEO/X-MATROSKA;BASE64,", "data:video/3gpp2;base64,",
     "data:image/gif;base64,", "data:image/webp;base64,", "data:application/octet-stream;base64,"],
)  # fmt: skip
async def test_a_data_url_of_a_video_gives_its_bytes(head: str) -> None:
    assert await fetch(head + base64.b64encode(BODY).decode(), "video") == BODY


@pytest.mark.parametrize("head", ["image/png", "image/jpeg", "audio/mp4", "text/html", "video"])
async def test_a_data_url_of_another_kind_is_no_video(head: str) -> None:
    error = await refusal(f"data:{head};base64,AAAA", "video")
    assert error.message == "A data: URL must have the form data:video/<format>;base64,<data>."


async def test_a_long_data_url_gives_its_bytes() -> None:
    body = BODY * 300  # several chunks of base64
    assert await fetch("data:image/png;base64," + base64.b64encode(body).decode()) == body


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,hello",
        "data:image/png,hello",
        "data:;base64,AAAA",
        "data:text/html;base64,AAAA",
        "data:video/jpeg;base64,AAAA",
        "data:image/png;charset=utf-8;base64,AAAA",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;base64,A",
        "data:image/png;base64,AA",
        "data:image/png;base64,AAA",
        "data:image/png;base64,AA=",
        "data:image/png;base64,AA==AA==",
        "data:image/png;base64,A===",
        "data:image/png;base64,====",
        "data:image/png;base64,AAAA====",
        "data:image/png;base64, AAA",
        "data:image/png;base64,AAAA\n",
        "data:image/png;base64,AA\nAA=",
        "data:image/png;base64,AA-_",
        "data:image/png;base64,AAA%3D",
        "data:image/png;base64,AAAÄ",
        "data:image/png;base64,\0\0\0\0",
        " data:image/png;base64,AAAA",
    ],
)
async def test_anything_but_strict_base64_is_refused(url: str) -> None:
    assert (await refusal(url)).code == "invalid_media"


@pytest.mark.parametrize("size", [1, 2, 3, 98, 99, 100])
async def test_the_size_cap_of_data_urls_is_exact(size: int) -> None:
    url = "data:image/png;base64," + base64.b64encode(BODY[:size]).decode()
    assert len(await fetch(url, max_media_bytes=size)) == size
    if size > 1:
        error = await refusal(url, max_media_bytes=size - 1)
        assert error.code == "media_too_large"


@pytest.mark.parametrize(
    ("kind", "name"), [("image", "max_media_bytes"), ("video", "max_video_bytes")]
)
async def test_each_kind_has_its_own_cap_and_is_called_by_its_name(
    site: Site, kind: Kind, name: str
) -> None:
    data = f"data:{kind}/x;base64," + base64.b64encode(BODY).decode()
    other = "max_video_bytes" if kind == "image" else "max_media_bytes"
    noun = "picture" if kind == "image" else "video"
    for url in (data, site.url(), File(BODY, b"")):
        assert await fetch(url, kind, **OPEN, **{name: len(BODY), other: 1}) == BODY
        error = await refusal(url, kind, **OPEN, **{name: len(BODY) - 1})
        assert error.message == f"The {noun} has more than {len(BODY) - 1} encoded bytes."
    site.pages["/404"] = lambda handler: answer(handler, 404, b"")
    for url, sentence in [
        (site.url("/404"), "could not be fetched."),
        ("ftp://x/", "'s URL must be a valid data:, http: or https: URL."),
        ("http://127.0.0.1:80/", "'s URL leads to an address that is not allowed."),
    ]:
        opened = OPEN if "404" in url else {}
        message = (await refusal(url, kind, **opened)).message
        assert message.startswith(f"The {noun}")
        assert message.endswith(sentence)


# what the parts of a request may have together


async def test_parts_of_one_request_share_an_allowance(site: Site) -> None:
    data = "data:application/octet-stream;base64," + base64.b64encode(BODY).decode()
    site.pages["/unannounced"] = lambda handler: (
        handler.send_response(200),
        handler.end_headers(),
        handler.wfile.write(BODY),
    )
    fetcher = Fetcher(MediaSettings(**OPEN, allowed_media_ports=()))
    for url in (data, site.url(), site.url("/unannounced"), File(BODY, b"")):
        allowance = Allowance(2 * len(BODY))
        for _ in range(2):
            assert await fetcher.fetch(url, PARAM, "video", allowance) == BODY
        with pytest.raises(MediaRefused) as refused:
            await fetcher.fetch(url, PARAM, "video", allowance)
        assert (refused.value.code, refused.value.param) == ("media_too_large", PARAM)
        assert str(2 * len(BODY)) in refused.value.message
    await fetcher.close()


async def test_what_failed_is_spent_too(site: Site) -> None:
    site.pages["/short"] = lambda handler: handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n" + BODY
    )
    fetcher = Fetcher(MediaSettings(**OPEN, allowed_media_ports=()))
    allowance = Allowance(1_000_000)
    with pytest.raises(MediaRefused):
        await fetcher.fetch(site.url("/short"), PARAM, "image", allowance)
    assert not allowance.has(1_000_000)
    assert allowance.has(1_000_000 - len(BODY))
    await fetcher.close()


async def test_a_part_alone_has_the_allowance_of_a_request(site: Site) -> None:
    error = await refusal(site.url(), **OPEN, max_request_media_bytes=len(BODY) - 1)
    assert error.code == "media_too_large"


# http: URLs


async def test_a_picture_is_downloaded(site: Site) -> None:
    assert await fetch(site.url("/cat.png?size=1#top"), **OPEN) == BODY
    path, headers = site.requests[0]
    assert path == "/cat.png?size=1"
    assert headers["Host"] == f"127.0.0.1:{site.port}"


async def test_the_host_header_is_the_name_and_the_name_is_resolved_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = resolve_to(monkeypatch, ["127.0.0.1"], ["127.0.0.9"])
    url = site.url(host="pictures.example")
    assert await fetch(url, **OPEN) == BODY
    assert looked_up == ["pictures.example"]
    assert site.requests[0][1]["Host"] == f"pictures.example:{site.port}"


def resolve_to(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Make the n-th look-up of a name give the n-th list of addresses; the names asked for."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_: object) -> list[Any]:
        asked.append(host)
        return [(0, 0, 0, "", (address, port)) for address in answers[len(asked) - 1]]

    monkeypatch.setattr(sources.socket, "getaddrinfo", getaddrinfo)
    return asked


async def test_the_next_address_is_tried_when_the_first_does_not_answer(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, ["::1", "127.0.0.1"])  # the site speaks IPv4 only
    assert await fetch(site.url(host="pictures.example"), **OPEN) == BODY


async def test_no_more_than_a_few_addresses_of_a_name_are_dialled(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = ["::1"] * (sources.MAX_ADDRESSES - 1)
    resolve_to(monkeypatch, [*others, "127.0.0.1"], [*others, "::1", "127.0.0.1"])
    assert await fetch(site.url(host="pictures.example"), **OPEN) == BODY
    refused = await refusal(site.url(host="pictures.example"), **OPEN)
    assert refused.code == "media_unreachable"


@pytest.mark.parametrize("user", ["user", "user:secret", ":", "example.com:80"])
async def test_a_url_with_a_user_in_it_is_refused(site: Site, user: str) -> None:
    assert (await refusal(site.url(host=f"{user}@127.0.0.1"), **OPEN)).code == "invalid_media"
    assert not site.requests


async def test_one_private_address_among_public_ones_refuses_the_name(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, ["93.184.216.34", "127.0.0.1"])
    assert (await refusal(site.url(host="pictures.example"))).code == "media_forbidden"
    assert not site.requests


@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_up_to_three_redirects_are_followed(site: Site, hops: int, status: int) -> None:
    for hop in range(hops):
        site.pages[f"/{hop}"] = redirect(f"/{hop + 1}" if hop < hops - 1 else site.url(), status)
    assert await fetch(site.url("/0"), **OPEN) == BODY
    assert len(site.requests) == hops + 1


async def test_a_fourth_redirect_is_refused(site: Site) -> None:
    site.pages["/loop"] = redirect("/loop")
    assert (await refusal(site.url("/loop"), **OPEN)).code == "media_unreachable"
    assert len(site.requests) == 4


async def test_a_redirect_to_a_private_address_is_not_followed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "is_public", lambda address: str(address) == "127.0.0.1")
    site.pages["/away"] = redirect(site.url("/secret", host="127.0.0.2"))
    assert await fetch(site.url()) == BODY
    assert (await refusal(site.url("/away"))).code == "media_forbidden"
    assert [path for path, _ in site.requests] == ["/cat.png", "/away"]


async def test_a_name_that_changes_its_address_on_a_redirect_is_not_followed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "is_public", lambda address: str(address) == "127.0.0.1")
    resolve_to(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    site.pages["/again"] = redirect("/secret")
    error = await refusal(site.url("/again", host="pictures.example"))
    assert error.code == "media_forbidden"
    assert [path for path, _ in site.requests] == ["/again"]


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png;base64,AAAA", "gopher://127.0.0.1",
     "http://user@127.0.0.1/", "http:\\\\127.0.0.1\\x", "javascript:1"],
)  # fmt: skip
async def test_a_redirect_to_anything_but_a_plain_web_address_is_refused(
    site: Site, target: str
) -> None:
    site.pages["/away"] = redirect(target)
    assert (await refusal(site.url("/away"), **OPEN)).code in {"invalid_media", "media_unreachable"}
    assert len(site.requests) == 1


async def test_a_redirect_outside_the_allowed_hosts_is_refused(site: Site) -> None:
    site.pages["/away"] = redirect(site.url("/secret", host="127.0.0.2"))
    error = await refusal(site.url("/away"), **OPEN, allowed_media_domains=("127.0.0.1",))
    assert error.code == "media_forbidden"
    assert len(site.requests) == 1


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("pictures.example", True), ("PICTURES.example", True), ("pictures.example.", True),
     ("bücher.example", True), ("xn--bcher-kva.example", True), ("example", False),
     ("evil.pictures.example", False), ("pictures.example.evil.test", False)],
)  # fmt: skip
async def test_allowed_hosts_are_compared_as_whole_names(
    site: Site, monkeypatch: pytest.MonkeyPatch, host: str, allowed: bool
) -> None:
    resolve_to(monkeypatch, ["127.0.0.1"])
    domains = ("Pictures.Example", "bücher.example")
    if allowed:
        assert await fetch(site.url(host=host), **OPEN, allowed_media_domains=domains) == BODY
    else:
        error = await refusal(site.url(host=host), **OPEN, allowed_media_domains=domains)
        assert error.code == "media_forbidden"


@pytest.mark.parametrize("name", ["https://pictures.example", "pictures.example:80", "a b", ""])
def test_an_allowed_host_that_is_no_host_is_fatal(name: str) -> None:
    with pytest.raises(SettingError):
        Fetcher(MediaSettings(allowed_media_domains=(name,)))


LOOPBACK_FORMS = [
    "FILE:///etc/passwd",
    "file:/etc/passwd",
    "file:etc/passwd",
    "file://///etc/passwd",
    "file://127.0.0.1/etc/passwd",
    "file:///%65tc/passwd",
    "HtTpS://LocalHost:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://127\uff0e0\uff0e0\uff0e1:{port}/",
    "http://127\uff610\uff610\uff611:{port}/",
    "http://127\u30020\u30020\u30021:{port}/",
    "http://\uff11\uff12\uff17.0.0.1:{port}/",
    "http://loc\u00adalhost:{port}/",
    "http://\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54:{port}/",
    "http://localhost\u200b:{port}/",
    "http://[::1%lo]:{port}/",
    "http://[::1%251]:{port}/",
    "http://[fe80::1%eth0]:{port}/",
    "http://[ff02::1%25eth0]:{port}/",
    "http://[::ffff:127.0.0.1%251]:{port}/",
    "http://[v1.127.0.0.1]:{port}/",
    "http://[127.0.0.1]:{port}/",
    "http://::1:{port}/",
    "http://0177.0.0.0x1:{port}/",
    "http://127.0.0.01:{port}/",
    "http://00000127.0.0.1:{port}/",
    "http://0x7f000001.:{port}/",
    "http://4294967297:{port}/",
    "http://[2001:470::5efe:127.0.0.1]:{port}/",
    "http://[2001:0:7f00:1::]:{port}/",
    "http://168.63.129.16:{port}/",
    "http://100.100.100.200:{port}/",
    "http://127.0.0.1:{port}/",
    "http://localhost:{port}/",
    "http://LOCALHOST:{port}/",
    "http://localhost.:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://127.255.255.254:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://0x7f.1:{port}/",
    "http://017700000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://0:{port}/",
    "http://0.0.0.0:{port}/",
    "http://[::]:{port}/",
    "http://[::1]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[64:ff9b:1::127.0.0.1]:{port}/",
    "http://[2002:7f00:1::1]:{port}/",
    "http://[::1%25lo]:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://127。0。0。1:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://%31%32%37.0.0.1:{port}/",
    "http://127.0.0.1%00.example:{port}/",
    "http://user@127.0.0.1:{port}/",
    "http://user:secret@127.0.0.1:{port}/",
    "http://example.com@127.0.0.1:{port}/",
    "http://example.com:80@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@example.com/",
    "http://example.com\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#@example.com/",
    "http://127.0.0.1:{port}?@example.com/",
    "http:127.0.0.1:{port}/",
    "http:/127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}\\",
    " http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/\r\nX: y",
    "http://127.0.0.1\t:{port}/",
    "https://127.0.0.1:{port}/",
    "HTTP://127.0.0.1:{port}/",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/",
    "ws://127.0.0.1:{port}/",
    "http+unix://127.0.0.1:{port}/",
    "jar:http://127.0.0.1:{port}/!/",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "/etc/passwd",
    "cat.png",
    "",
    "http://",
    "http://:{port}/",
    "http://[::1",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:-1/",
    "http://127.0.0.1:0/",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://192.0.0.192/opc/v2/instance/",
    "http://" + "a" * 9000,
]


@pytest.mark.parametrize("form", LOOPBACK_FORMS)
async def test_no_form_of_a_url_reaches_a_private_address(site: Site, form: str) -> None:
    fetcher = Fetcher(MediaSettings(allowed_media_ports=()))
    for kind in get_args(Kind):
        with pytest.raises(MediaRefused) as refused:
            await fetcher.fetch(form.replace("{port}", str(site.port)), PARAM, kind)
        assert refused.value.code in {"invalid_media", "media_forbidden", "media_unreachable"}
        assert refused.value.param == PARAM
    assert not site.requests
    await fetcher.close()


# what a hostile or broken server may do


async def test_a_body_over_the_cap_is_refused_from_its_announcement(site: Site) -> None:
    error = await refusal(site.url(), **OPEN, max_media_bytes=len(BODY) - 1)
    assert error.code == "media_too_large"
    assert await fetch(site.url(), **OPEN, max_media_bytes=len(BODY)) == BODY


async def test_an_endless_body_is_cut_at_the_cap(site: Site) -> None:
    sent = 0
    broke_off = threading.Event()

    def endless(handler: Any) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        try:
            while not site.stopping.is_set():
                sent += handler.wfile.write(b"x" * 65536)
        except OSError:
            broke_off.set()

    site.pages["/endless"] = endless
    error = await refusal(site.url("/endless"), **OPEN, max_media_bytes=1 << 20)
    assert error.code == "media_too_large"
    assert await asyncio.to_thread(broke_off.wait, 60)
    assert sent < 32 << 20


@pytest.mark.parametrize("when", ["before the head", "within the head", "within the body"])
async def test_a_slow_server_costs_no_more_than_the_deadline(site: Site, when: str) -> None:
    def slow(handler: Any) -> None:
        if when != "before the head":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        if when == "within the body":
            handler.wfile.write(b"Content-Length: 1000\r\n\r\n")
            while not site.stopping.wait(0.02):  # each read is quick; only the whole is slow
                handler.wfile.write(b"x")
        site.stopping.wait(600)

    site.pages["/slow"] = slow
    async with asyncio.timeout(60):
        error = await refusal(site.url("/slow"), **OPEN, fetch_timeout=0.3)
    assert error.code == "media_unreachable"


@pytest.mark.parametrize("status", [204, 206, 304, 400, 401, 403, 404, 429, 500, 503])
async def test_any_status_but_200_is_refused(site: Site, status: int) -> None:
    site.pages["/no"] = lambda handler: answer(handler, status, b"")
    error = await refusal(site.url("/no"), **OPEN)
    assert error.code == "media_unreachable"


async def test_a_client_cannot_tell_how_a_fetch_failed_but_the_log_can(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer would be a map of the network the server stands in."""
    caplog.set_level("INFO")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{closed.getsockname()[1]}/cat.png"
        site.pages = {
            "/404": lambda handler: answer(handler, 404, b""),
            "/500": lambda handler: answer(handler, 500, b""),
            "/slow": lambda _: site.stopping.wait(600) and None,
            "/loop": redirect("/loop"),
            "/gzip": lambda handler: answer(handler, Content_Encoding="gzip"),
            "/short": lambda handler: handler.wfile.write(
                b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort"
            ),
            "/none": lambda handler: handler.wfile.write(b""),
        }
        urls = [refused, *map(site.url, site.pages)]
        hasty = [urls.pop(urls.index(site.url("/slow"))), "http://no-such-host.invalid/"]
        errors = [await refusal(url, **OPEN, fetch_timeout=60.0) for url in urls]
        errors += [await refusal(url, **OPEN, fetch_timeout=0.5) for url in hasty]
    assert {(error.message, error.code) for error in errors} == {
        ("The picture could not be fetched.", "media_unreachable")
    }
    for reason in ("status 404", "status 500", "in time", "redirects", "no connection"):
        assert reason in caplog.text


@pytest.mark.parametrize(
    ("url", "allowed", "ports"),
    [
        ("http://127.0.0.1:{port}/", False, ("80", "443")),
        ("http://127.0.0.1:{port}/", True, ("80", "{port}")),
        ("http://127.0.0.1:{port}/", True, ()),
        ("http://127.0.0.1:{port}/away", False, ("{port}",)),
        ("http://127.0.0.1/", False, ("443",)),
    ],
)
async def test_only_the_allowed_ports_are_dialled(
    site: Site, url: str, allowed: bool, ports: tuple[str, ...]
) -> None:
    site.pages["/away"] = redirect("http://127.0.0.1:81/")
    url = url.replace("{port}", str(site.port))
    ports = tuple(port.replace("{port}", str(site.port)) for port in ports)
    if allowed:
        assert await fetch(url, **OPEN, allowed_media_ports=ports) == BODY
    else:
        error = await refusal(url, **OPEN, allowed_media_ports=ports)
        assert (error.code, "port" in error.message) == ("media_forbidden", True)
        assert [path for path, _ in site.requests] == ["/away"] * url.endswith("/away")


def test_by_default_the_ports_are_those_of_the_web() -> None:
    assert MediaSettings().allowed_media_ports == ("80", "443")


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_an_allowed_port_that_is_no_port_is_fatal(port: str) -> None:
    with pytest.raises(SettingError):
        Fetcher(MediaSettings(allowed_media_ports=(port,)))


@pytest.mark.parametrize(
    "raw",
    [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", b"HTTP/1.1 302 Found\r\n\r\n",
     b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n"],
)  # fmt: skip
async def test_a_server_that_does_not_speak_http_is_refused(site: Site, raw: bytes) -> None:
    site.pages["/raw"] = lambda handler: handler.wfile.write(raw)
    assert (await refusal(site.url("/raw"), **OPEN)).code in {"media_unreachable", "invalid_media"}


async def test_a_port_nobody_listens_on_is_a_client_error() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        error = await refusal(f"http://127.0.0.1:{closed.getsockname()[1]}/cat.png", **OPEN)
    assert error.code == "media_unreachable"


async def test_a_name_that_does_not_exist_is_a_client_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(sources.socket, "getaddrinfo", nothing)
    assert (await refusal("http://pictures.example/", **OPEN)).code == "media_unreachable"


async def test_cookies_of_one_fetch_are_not_sent_with_the_next(site: Site) -> None:
    site.pages["/set"] = lambda handler: answer(handler, Set_Cookie="who=alice")
    fetcher = Fetcher(MediaSettings(**OPEN, allowed_media_ports=()))
    for path in ("/set", "/cat.png"):
        assert await fetcher.fetch(site.url(path), PARAM) == BODY
    await fetcher.close()
    assert "Cookie" not in site.requests[1][1]


@needs_openssl
async def test_a_certificate_is_checked_against_the_name_not_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, asked = certified(tmp_path, "pictures.example", monkeypatch)
    secure = Site(context)
    try:
        resolve_to(monkeypatch, ["127.0.0.1"], ["127.0.0.1"])
        assert await fetch(f"https://pictures.example:{secure.port}/", **OPEN) == BODY
        assert asked == ["pictures.example"]
        error = await refusal(f"https://other.example:{secure.port}/", **OPEN)
        assert error.code == "media_unreachable"
        assert len(secure.requests) == 1
    finally:
        secure.close()
