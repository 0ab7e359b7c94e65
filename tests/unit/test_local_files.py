"""Files by file: URL: those of the allowed folder, and no way out of it or hint of the rest."""

import asyncio
import os
import tempfile
import threading
from pathlib import Path
from urllib.parse import quote

import pytest

from preprocessing import local_files
from preprocessing.sources import Fetcher
from tests.sites import BODY, PARAM, Site, fetch, redirect, refusal
from wire.errors import MediaRefused
from wire.settings import MediaSettings, SettingError

ANSWER = "The picture's URL names no file that this server may read."


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """The allowed folder, with a picture in it and a secret beside it."""
    media = tmp_path / "media"
    (media / "inner").mkdir(parents=True)
    for path in (media / "cat.png", media / "inner/cat dog %2e.png", tmp_path / "secret"):
        path.write_bytes(BODY)
    (tmp_path / "media-of-others").mkdir()
    (tmp_path / "media-of-others/cat.png").write_bytes(BODY)
    return media


async def refused(url: str, media: Path) -> None:
    """Refused in the one way that everything is."""
    error = await refusal(url, allowed_local_media_path=str(media))
    assert (error.message, error.code) == (ANSWER, "media_forbidden")


@pytest.mark.parametrize(
    "form",
    ["file://{media}/cat.png", "FILE://{media}/cat.png", "file://localhost{media}/cat.png",
     "file://LocalHost{media}/cat.png", "file://{media}/%63%61t%2Epng",
     "file://{media}/inner/cat%20dog%20%252e.png"],
)  # fmt: skip
async def test_a_file_of_the_folder_is_read(media: Path, form: str) -> None:
    url = form.replace("{media}", str(media))
    assert await fetch(url, allowed_local_media_path=str(media)) == BODY


@pytest.mark.parametrize("name", ["b\u00fccher.png", "a b.png", "a#b?.png", "%41.png", "-", "..."])
async def test_names_of_every_kind_can_be_written(media: Path, name: str) -> None:
    (media / name).write_bytes(BODY)
    url = f"file://{media}/{quote(name)}"
    assert await fetch(url, "video", allowed_local_media_path=str(media)) == BODY


async def test_links_are_followed_inside_the_folder_only(media: Path) -> None:
    (media / "link.png").symlink_to("inner/../cat.png")
    (media / "absolute.png").symlink_to(media / "cat.png")
    (media / "folder").symlink_to("inner")
    alias = media.parent / "alias"
    alias.symlink_to(media)
    for folder in (media, alias):
        for path in ("link.png", "absolute.png", "folder/cat%20dog%20%252e.png"):
            url = f"file://{folder}/{path}"
            # The folder can be set by its name or by its alias, and asked for by what was set.
            assert await fetch(url, allowed_local_media_path=str(folder)) == BODY
    (media / "out.png").symlink_to("../secret")
    (media / "out").symlink_to("..")
    (media / "loop").symlink_to("loop")
    for path in ("out.png", "out/secret", "out/media-of-others/cat.png", "loop", "loop/x"):
        await refused(f"file://{media}/{path}", media)
    await refused(f"file://{alias}/cat.png", media)  # only named from outside


@pytest.mark.parametrize(
    "form",
    ["file://{media}/none.png", "file://{media}/none/cat.png", "file://{media}/cat.png/",
     "file://{media}/cat.png/x", "file://{media}", "file://{media}/", "file://{media}/inner",
     "file://{media}/inner/", "file://{media}/inner/../cat.png", "file://{media}/./cat.png",
     "file://{media}//cat.png", "file:///{media}/cat.png", "file://{media}/../secret",
     "file://{media}/%2e%2e/secret", "file://{media}/%2E%2E%2Fsecret",
     "file://{media}/..%2fsecret", "file://{media}/inner%2fcat.png", "file://{media}%2fcat.png",
     "file://{media}/cat.png%00", "file://{media}/cat.png%00.jpg", "file://{media}/cat.pn%g7",
     "file://{media}/cat.png%", "file://{media}/cat.png%2", "file://{media}/cat.png?x",
     "file://{media}/cat.png#x", "file://{media}/cat.png\0", "file://{media}/cat.png\n",
     "file://{media}\\cat.png", "file://{media}/cat\ud800.png", "file:{media}/cat.png",
     "file:/{media}/cat.png", "file:cat.png", "file://cat.png", "file://host{media}/cat.png",
     "file://127.0.0.1{media}/cat.png", "file://localhost:80{media}/cat.png",
     "file://user@localhost{media}/cat.png", "file://{media}-of-others/cat.png",
     "file:///etc/passwd", "file:///etc/no-such-file", "file:///proc/self/environ",
     "file:///dev/zero", "file://{media}/" + "a" * 300, "file://{media}/" + "a" * 9000,
     "file://{media}" + "/a" * 3000],
)  # fmt: skip
async def test_everything_else_gets_the_same_answer(media: Path, form: str) -> None:
    await refused(form.replace("{media}", str(media)), media)


async def test_only_regular_files_are_read_and_none_is_waited_for(media: Path) -> None:
    os.mkfifo(media / "pipe")
    (media / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device", "inner"):
        async with asyncio.timeout(60):
            await refused(f"file://{media}/{name}", media)


async def test_an_unreadable_file_is_as_good_as_none() -> None:
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # noqa: S103 - tmp_path lies in folders that others cannot enter
        file = Path(folder, "cat.png")
        file.write_bytes(BODY)
        fetcher = Fetcher(MediaSettings(allowed_local_media_path=folder))
        assert await fetcher.fetch(file.as_uri(), PARAM) == BODY
        file.chmod(0)
        if root:  # who may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(MediaRefused, match=ANSWER):
                await fetcher.fetch(file.as_uri(), PARAM)
        finally:
            if root:
                os.seteuid(0)
            await fetcher.close()


async def test_without_the_setting_no_file_is_known_to_exist(media: Path) -> None:
    answers = {
        ((error := await refusal(f"file://{path}")).message, error.code)
        for path in (media / "cat.png", media / "none", media, "/etc/passwd", "", "host/x")
    }
    assert answers == {
        ("The picture's URL must be a valid data:, http: or https: URL.", "invalid_media")
    }


async def test_no_web_server_can_send_the_fetcher_to_a_file(site: Site, media: Path) -> None:
    site.pages["/away"] = redirect(f"file://{media}/cat.png")
    open_settings = {"allow_private_media": True, "allowed_local_media_path": str(media)}
    assert await fetch(f"file://{media}/cat.png", **open_settings) == BODY
    assert (await refusal(site.url("/away"), **open_settings)).code == "invalid_media"


async def test_the_caps_hold_for_files(media: Path) -> None:
    url, allowed = f"file://{media}/cat.png", {"allowed_local_media_path": str(media)}
    assert await fetch(url, **allowed, max_media_bytes=len(BODY)) == BODY
    for setting in ("max_media_bytes", "max_request_media_bytes"):
        error = await refusal(url, **allowed, **{setting: len(BODY) - 1})
        assert error.code == "media_too_large"
    with (media / "huge").open("wb") as file:
        file.truncate(1 << 40)
    error = await refusal(f"file://{media}/huge", **allowed)
    assert error.code == "media_too_large"


async def test_a_file_that_grows_while_it_is_read_stops_at_the_cap(
    media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.read

    def read_and_grow(descriptor: int, size: int) -> bytes:
        with (media / "cat.png").open("ab") as file:
            file.write(BODY)
        return real(descriptor, size)

    monkeypatch.setattr(local_files, "_CHUNK", 1000)
    monkeypatch.setattr(local_files.os, "read", read_and_grow)
    error = await refusal(
        f"file://{media}/cat.png", allowed_local_media_path=str(media), max_media_bytes=50_000
    )
    assert error.code == "media_too_large"


async def test_a_slow_disk_costs_no_more_than_the_deadline(
    media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    may_go_on = threading.Event()
    real = os.read

    def slow_read(descriptor: int, size: int) -> bytes:
        nonlocal reads
        reads += 1
        may_go_on.wait(120)
        return real(descriptor, 1)

    monkeypatch.setattr(local_files.os, "read", slow_read)
    fetcher = Fetcher(MediaSettings(allowed_local_media_path=str(media), fetch_timeout=0.2))
    async with asyncio.timeout(60):
        with pytest.raises(MediaRefused) as refused:
            await fetcher.fetch(f"file://{media}/cat.png", PARAM)
    assert refused.value.code == "media_unreachable"
    may_go_on.set()
    fetcher._threads.shutdown(wait=True)
    assert reads == 1, "nobody waits for the rest"


@pytest.mark.parametrize("where", ["the file", "a folder", "the allowed folder"])
async def test_what_is_swapped_after_the_check_is_not_followed(
    media: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A link out of the folder takes the place of something between the check and the open."""
    outside = media.parent / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "dog.png").write_bytes(b"secret")
    (outside / "inner/dog.png").write_bytes(b"secret")
    (media / "inner/dog.png").write_bytes(BODY)
    swapped, target = {
        "the file": (media / "inner/dog.png", outside / "dog.png"),
        "a folder": (media / "inner", outside),
        "the allowed folder": (media, outside),
    }[where]
    checked = local_files._open

    def swap_then_open(root: bytes, names: list[bytes]) -> int:
        swapped.rename(media.parent / "moved")
        swapped.symlink_to(target)
        return checked(root, names)

    url = f"file://{media}/inner/dog.png"
    assert await fetch(url, allowed_local_media_path=str(media)) == BODY
    monkeypatch.setattr(local_files, "_open", swap_then_open)
    await refused(url, media)


def test_an_allowed_folder_that_is_none_is_fatal(media: Path) -> None:
    for path in (media / "cat.png", media / "none"):
        with pytest.raises(SettingError) as error:
            Fetcher(MediaSettings(allowed_local_media_path=str(path)))
        assert "allowed_local_media_path" in str(error.value)
