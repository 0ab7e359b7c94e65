"""The media pipeline with real decode workers: what it gives, and what a worker's end costs."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from preprocessing import (
    FrameChoice,
    MediaPart,
    MediaPipeline,
    Spent,
    TiledMedia,
    TiledVideo,
    pool,
)
from preprocessing.images import open_picture
from preprocessing.media import Confine, Confined, File, FromWorker, Refused, TileJob, TileSettings
from preprocessing.tiling import tile
from server.chat.showing import load_all
from tests import clips
from tests.fake_engine import make_ready
from tests.process import lying_worker
from tests.sandboxed import deaths
from tests.sites import Site, answer
from wire.channel import Channel
from wire.digest import content_digest
from wire.errors import MediaRefused, Unavailable
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings

ROOT = Path(__file__).parents[2]
GEOMETRY = VisionGeometry(tile_size=lying_worker.SIDE, tokens_per_tile=1)
PARAM = "messages[0].content[1].image_url"
DEADLINE = 60.0


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def part(encoded: bytes, max_tiles: int | None = None) -> MediaPart:
    url = "data:image/png;base64," + base64.b64encode(encoded).decode()
    return MediaPart(url, PARAM, max_tiles)


def plain(colour: str = "red", size: tuple[int, int] = (30, 20)) -> MediaPart:
    return part(encode(Image.new("RGB", size, colour)))


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@contextlib.asynccontextmanager
async def pipeline(
    geometry: VisionGeometry = GEOMETRY, **settings: Any
) -> AsyncIterator[MediaPipeline]:
    # Without its cache every load asks a worker, which is what most tests here are about.
    media = MediaPipeline(MediaSettings(**{"tile_cache_bytes": 0, "media_workers": 1, **settings}))
    try:
        await media.start(geometry)
        yield media
    finally:
        await media.close()


async def refusal(media: MediaPipeline, asked: MediaPart) -> MediaRefused:
    with pytest.raises(MediaRefused) as refused:
        await media.load(asked)
    assert refused.value.param == PARAM
    return refused.value


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something has happened."""
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.005)


async def gone(pid: int) -> bool:
    """Wait for the end of a process that may not be our child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        readable, _, _ = await asyncio.to_thread(select.select, [handle], [], [], DEADLINE)
        return bool(readable)
    finally:
        os.close(handle)


@contextlib.asynccontextmanager
async def hanging_job(
    media: MediaPipeline, asked: MediaPart
) -> AsyncIterator[tuple[int, "asyncio.Task[TiledMedia]"]]:
    """A job whose worker stands still: its process id and the waiting call."""
    (pid,) = media.worker_pids
    os.kill(pid, signal.SIGSTOP)
    waiting = asyncio.create_task(media.load(asked))
    await until(lambda: media.stats.busy == 1)
    yield pid, waiting
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


# what it gives


@pytest.mark.parametrize(
    ("size", "max_tiles"), [((30, 20), None), ((100, 12), None), ((30, 20), 1), ((7, 90), 6)]
)
async def test_tiles_are_those_of_the_picture(size: tuple[int, int], max_tiles: int | None) -> None:
    picture = Image.effect_noise(size, 60).convert("RGB")
    settings = TileSettings.of(GEOMETRY, max_tiles)
    tiles, count, columns, rows = tile(picture, settings)
    async with pipeline() as media:
        loaded = await media.load(part(encode(picture), max_tiles))
    assert (loaded.tiles, loaded.count) == (tiles, count)
    assert (loaded.columns, loaded.rows) == (columns, rows)
    assert (loaded.width, loaded.height) == size


async def test_at_full_size_thirteen_tiles_come_back() -> None:
    geometry = VisionGeometry(tile_size=448, tokens_per_tile=256)
    async with pipeline(geometry) as media:
        loaded = await media.load(plain(size=(640, 480)))
        assert (loaded.count, loaded.columns, loaded.rows) == (13, 4, 3)
        assert len(loaded.tiles) == 13 * 3 * 448 * 448


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
async def test_every_format_is_decoded_inside_the_sandbox(kind: str) -> None:
    picture = Image.effect_noise((60, 40), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in {"PNG", "JPEG", "WEBP", "TIFF"} else {}
    encoded = encode(picture, kind, **options)
    async with pipeline() as media:
        loaded = await media.load(part(encoded))
        assert deaths(media) == 0
    upright = open_picture(encoded, 10_000)
    assert (loaded.width, loaded.height) == upright.size == ((40, 60) if options else (60, 40))
    assert loaded.tiles == tile(upright, TileSettings.of(GEOMETRY))[0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is told")
async def test_a_worker_uses_its_memory_again() -> None:
    """Taken anew, the 40 MB of a picture with 13 tiles are 10,000 page faults."""
    geometry = VisionGeometry(tile_size=448, tokens_per_tile=256)
    async with pipeline(geometry) as media:

        def faults() -> int:
            (pid,) = media.worker_pids
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1]
            return int(fields.split()[7])

        asked = plain(size=(1000, 750))
        for _ in range(3):
            await media.load(asked)
        before = faults()
        for _ in range(5):
            await media.load(asked)
        assert faults() - before < 5000


async def test_the_digest_says_whether_tiles_are_the_same() -> None:
    red, blue = (
        encode(Image.new("RGB", (30, 20), "red")),
        encode(Image.new("RGB", (30, 20), "blue")),
    )
    async with pipeline() as media:
        asked = [part(red), part(red), part(blue), part(red, 1), part(red, 6), part(red, 12)]
        digests = [(await media.load(one)).digest for one in asked]
    assert digests[0] == digests[1] == digests[5]
    assert len(set(digests)) == 4
    assert all(len(digest) == 32 for digest in digests)


async def test_neither_a_part_nor_its_tiles_can_end_up_in_a_log() -> None:
    asked = plain()
    async with pipeline() as media:
        loaded = await media.load(asked)
    assert "base64" not in repr(asked)
    assert len(repr(loaded)) < 300


async def test_the_time_of_a_picture_is_told_part_by_part_and_only_of_what_was_done() -> None:
    async with pipeline(tile_cache_bytes=1 << 20) as media:
        first, again = [await media.load(plain()) for _ in range(2)]
        assert min(first.spent) > 0
        assert again.spent == Spent(again.spent.fetch)
        assert again.spent.fetch > 0
        stats = media.stats
        assert (stats.tile_queries, stats.tile_hits, stats.decoded) == (2, 1, 1)


def test_a_worker_that_claims_more_time_than_there_was_is_not_believed() -> None:
    assert Spent(1, 0, 2, 3).within(10) == Spent(1, 5, 2, 3)
    assert Spent(1, 0, 1e30, 3).within(10) == Spent(1, 0, 10, 0)
    assert Spent(1, 0, 2, 1e30).within(10) == Spent(1, 0, 2, 8)


async def test_many_at_once_each_get_their_own() -> None:
    colours = [(value, 255 - value, 7) for value in range(0, 240, 8)]
    async with pipeline(media_workers=2) as media:
        asked = [part(encode(Image.new("RGB", (16, 16), colour))) for colour in colours]
        loaded = await asyncio.gather(*map(media.load, asked))
        assert len(media.worker_pids) == 2
        assert media.stats.decoded == len(colours)
    for colour, one in zip(colours, loaded, strict=True):
        assert (one.tiles[0], one.tiles[256], one.tiles[512]) == colour


async def test_a_picture_that_finds_no_memory_for_too_long_is_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("preprocessing.pipeline.QUEUE_TIMEOUT", 0)
    async with pipeline(media_memory=1) as media:
        async with hanging_job(media, plain()) as (pid, first):
            with pytest.raises(Unavailable) as refused:
                await media.load(plain("blue"))
            assert refused.value.retry_after
            os.kill(pid, signal.SIGCONT)
            assert (await first).count
        assert (await media.load(plain("blue"))).count


async def test_only_as_many_pictures_as_the_memory_holds_are_on_their_way() -> None:
    one = TileSettings.of(GEOMETRY).most_bytes + 200
    async with pipeline(media_memory=4 * one) as media:
        fetched: list[str] = []
        fetch = media._fetcher.fetch

        async def counting(url: str, *others: Any) -> bytes:
            fetched.append(url)
            return await fetch(url, *others)

        media._fetcher.fetch = counting  # type: ignore[method-assign]
        async with hanging_job(media, plain()) as (pid, first):
            others = [asyncio.create_task(media.load(plain("blue"))) for _ in range(4)]
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(fetched) == 2
            os.kill(pid, signal.SIGCONT)
            assert (await first).count
            assert all(loaded.count for loaded in await asyncio.gather(*others))


async def test_a_server_that_never_answers_keeps_no_picture_waiting(site: Site) -> None:
    async with pipeline(allow_private_media=True, allowed_media_ports=()) as media:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/film.mp4"
            film = MediaPart(url, PARAM, kind="video", choice=FrameChoice(32))
            slow = [asyncio.create_task(media.load(film)) for _ in range(8)]
            asked, _ = await asyncio.get_running_loop().run_in_executor(None, silent.accept)
            with asked:
                async with asyncio.timeout(DEADLINE):
                    assert (await media.load(plain())).size
                    async with media.hold([plain()]):
                        pass
                    # Nor one that another server sends.
                    site.pages["/"] = lambda handler: answer(handler, body=encode(NOISE))
                    picture = MediaPart(site.url("/"), PARAM)
                    assert (await media.load(picture)).size
                assert not any(one.done() for one in slow)
                for one in slow:
                    one.cancel()
                await asyncio.gather(*slow, return_exceptions=True)


async def test_uploads_that_never_end_leave_downloads_their_room(site: Site) -> None:
    body = encode(NOISE)
    site.pages["/"] = lambda handler: answer(handler, body=body)
    memory = {"media_memory": 5 * len(body)}
    settings = {"allow_private_media": True, "allowed_media_ports": ()} | memory
    async with pipeline(**settings) as media, media.arriving() as one, media.arriving() as other:
        assert one.grow(media.most_arriving)
        assert not other.grow(1)
        assert (await media.load(MediaPart(site.url("/"), PARAM))).size
        one.keep(0)
        assert other.grow(1)


async def test_downloads_that_find_no_memory_are_told_to_come_again(site: Site) -> None:
    """None waits for another: each could hold what the other needs."""
    body = encode(NOISE)
    half = len(body) * 3 // 2
    arrived, go_on = threading.Event(), threading.Event()

    def slow(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:-1])
        arrived.set()
        go_on.wait(DEADLINE)
        handler.wfile.write(body[-1:])

    site.pages |= {"/slow": slow, "/": lambda handler: answer(handler, body=body)}
    settings = {"allow_private_media": True, "allowed_media_ports": (), "media_memory": 2 * half}
    async with pipeline(**settings) as media:
        first = asyncio.create_task(media.load(MediaPart(site.url("/slow"), PARAM)))
        assert await asyncio.to_thread(arrived.wait, DEADLINE)
        await until(lambda: media._downloads.used >= len(body) - 1)
        with pytest.raises(Unavailable) as refused:
            await media.load(MediaPart(site.url("/"), PARAM))
        assert (refused.value.status, refused.value.param) == (503, PARAM)
        go_on.set()
        assert (await first).size
        assert (await media.load(MediaPart(site.url("/"), PARAM))).size
        assert media._downloads.used == 0


async def test_a_request_of_many_pictures_does_not_hold_up_one_of_one() -> None:
    ready = make_ready(max_model_len=10_000)
    async with pipeline() as media, hanging_job(media, plain()) as (pid, _):
        done = []

        async def load(asked: MediaPart) -> Any:
            loaded = await media.load(asked)
            done.append(asked)
            return loaded

        many = asyncio.create_task(load_all(load, [plain("blue")] * 50, ready, 3))
        for _ in range(20):
            await asyncio.sleep(0)
        single = asyncio.create_task(load_all(load, [plain("green")], ready, 3))
        for _ in range(20):
            await asyncio.sleep(0)
        os.kill(pid, signal.SIGCONT)
        await single
        assert done.index(plain("green")) <= 3  # in line before it
        assert not many.done()
        assert len(await many) == 50


# what it refuses


def bomb() -> bytes:
    """A PNG of a few bytes that promises ten thousand million pixels."""
    encoded = bytearray(encode(Image.new("RGB", (1, 1))))
    encoded[16:24] = struct.pack(">II", 100_000, 100_000)
    encoded[29:33] = struct.pack(">I", zlib.crc32(encoded[12:29]))
    return bytes(encoded)


NOISE = Image.effect_noise((200, 200), 90).convert("RGB")


@pytest.mark.parametrize(
    ("encoded", "code"),
    [
        (b"not a picture", "unsupported_media"),
        (bytes(1000), "unsupported_media"),
        (bomb(), "media_too_large"),
        (encode(Image.new("1", (1001, 1000))), "media_too_large"),
        *(
            (encode(NOISE, kind)[:-3000], "invalid_media")
            for kind in ("PNG", "JPEG", "GIF", "WEBP")
        ),
    ],
)
async def test_a_bad_picture_is_refused_and_the_worker_lives_on(encoded: bytes, code: str) -> None:
    async with pipeline(max_image_pixels=1_000_000) as media:
        before = media.worker_pids
        for _ in range(2):
            assert (await refusal(media, part(encoded))).code == code
        assert (await media.load(plain())).count
        assert media.worker_pids == before
        assert (media.stats.refused, deaths(media)) == (2, 0)


async def test_a_picture_that_takes_more_memory_than_the_sandbox_has_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "BYTES_PER_PIXEL", 1)
    monkeypatch.setattr(pool, "SPARE_MEMORY", 0)
    small = {"max_media_bytes": 1 << 20, "max_video_bytes": 1}
    async with pipeline(max_image_pixels=9_000_000, **small) as media:
        large = part(encode(Image.new("RGB", (3000, 3000))))
        assert (await refusal(media, large)).code == "media_too_large"
        assert (await media.load(plain())).count
        assert deaths(media) == 0


async def test_a_picture_that_takes_too_long_is_refused() -> None:
    slow = part(encode(Image.new("RGB", (7000, 7000)), compress_level=1))
    async with pipeline(media_timeout=0.1) as media:
        (before,) = media.worker_pids
        assert (await refusal(media, slow)).code == "media_timeout"
        await until(lambda: len(media.worker_pids) == 1 and before not in media.worker_pids)


# what a worker's end costs


def kills(media: MediaPipeline) -> dict[str, int]:
    """Why workers ended, but not those of the close."""
    return {why: count for why, count in media.stats.kills.items() if count}


async def test_a_worker_killed_at_work_costs_nothing() -> None:
    async with pipeline() as media, hanging_job(media, plain()) as (pid, waiting):
        next_one = asyncio.create_task(media.load(plain("blue")))
        os.kill(pid, signal.SIGKILL)
        assert (await waiting).count
        assert (await next_one).count
        assert deaths(media) == 1
        assert await gone(pid)


async def test_a_picture_whose_workers_die_twice_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lie(monkeypatch, "dies at work")
    async with pipeline() as media:
        error = await refusal(media, plain())
        assert (error.message, error.code) == (
            "The picture could not be decoded.",
            "invalid_media",
        )
        assert deaths(media) == 2
        await until(lambda: kills(media) == {"exit": 2})


async def test_an_error_nobody_expected_ends_its_request_and_replaces_the_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker was neither given back nor replaced: every later picture waited in vain."""

    async def run(*_: object) -> None:
        raise RuntimeError("a bug")

    async with pipeline() as media:
        (pid,) = media.worker_pids
        with monkeypatch.context() as bug:
            bug.setattr(pool._Worker, "run", run)
            with pytest.raises(RuntimeError):
                await media.load(plain())
        assert "unexpected error in a decode job" in caplog.text
        async with asyncio.timeout(DEADLINE):
            assert (await media.load(plain())).count
        assert await gone(pid)


async def test_a_replacement_is_tried_until_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PAUSE", 0.05)
    failed = asyncio.Event()

    def popen(*_: object, **__: object) -> None:
        failed.set()
        raise ValueError("nobody expects this")

    async with pipeline() as media:
        (pid,) = media.worker_pids
        with monkeypatch.context() as broken:
            broken.setattr(pool.subprocess, "Popen", popen)
            os.kill(pid, signal.SIGKILL)
            assert await gone(pid)
            waiting = asyncio.create_task(media.load(plain()))
            async with asyncio.timeout(DEADLINE):
                await failed.wait()
        assert (await waiting).count


async def test_a_worker_that_hangs_is_killed_at_the_deadline_and_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pipeline() as media:
        with monkeypatch.context() as hasty:
            hasty.setattr(media._pool, "_timeout", lambda _: 0.5)  # of this job
            async with hanging_job(media, plain()) as (pid, waiting):
                with pytest.raises(MediaRefused) as refused:
                    await waiting
                assert (refused.value.param, refused.value.code) == (PARAM, "media_timeout")
                assert await gone(pid)
        assert (await media.load(plain())).count
        stats = media.stats
        assert (deaths(media), stats.replaced) == (0, 1)
        await until(lambda: kills(media) == {"timeout": 1})


async def test_a_hanging_worker_does_not_hold_up_the_others() -> None:
    async with pipeline(media_workers=2) as media:
        victim, healthy = media.worker_pids
        os.kill(victim, signal.SIGSTOP)
        jobs = [asyncio.create_task(media.load(plain())) for _ in range(6)]
        await until(lambda: sum(job.done() for job in jobs) == 5)
        os.kill(victim, signal.SIGKILL)
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        assert not any(isinstance(outcome, BaseException) for outcome in outcomes)
        assert healthy in media.worker_pids


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGKILL, "killed"),  # as the system does where memory is short
        (signal.SIGSEGV, "crash"),
        (signal.SIGXCPU, "processor_time"),
        (signal.SIGSYS, "seccomp"),
        (signal.SIGRTMIN + 1, "crash"),  # has no name
    ],
)
async def test_a_worker_killed_while_idle_costs_nothing_and_is_told_from_others(
    number: int, why: str
) -> None:
    async with pipeline() as media:
        (pid,) = media.worker_pids
        os.kill(pid, number)
        assert await gone(pid)
        assert (await media.load(plain())).count
        assert deaths(media) == 1
        await until(lambda: kills(media) == {why: 1})
        await until(lambda: pid not in media.worker_pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_to_the_whole_group_does_not_end_a_worker(number: int) -> None:
    """A terminal's Ctrl-C and systemd's stop reach every process; the server decides alone."""
    async with pipeline() as media:
        before = media.worker_pids
        for pid in before:
            os.kill(pid, number)
        assert (await media.load(plain())).count
        assert (media.worker_pids, deaths(media)) == (before, 0)


async def test_a_caller_that_leaves_gives_its_worker_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "ABANDONED", DEADLINE)
    async with pipeline() as media, hanging_job(media, plain()) as (pid, waiting):
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        os.kill(pid, signal.SIGCONT)
        assert (await media.load(plain())).count
        assert media.worker_pids == [pid]


async def test_a_long_job_whose_caller_left_does_not_keep_its_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "ABANDONED", 0.01)
    async with pipeline() as media, hanging_job(media, film()) as (pid, waiting):
        waiting.cancel()
        assert await gone(pid)
        assert (await media.load(plain())).count
        assert (await refusal(media, film())).code == "unsupported_media"  # nor its place
        assert (media.stats.replaced, deaths(media), media.stats.busy) == (1, 0, 0)
        assert kills(media) == {"abandoned": 1}


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_videos_leave_one_of_several_workers_to_pictures(workers: int) -> None:
    async with pipeline(media_workers=workers) as media, asyncio.TaskGroup() as tasks:
        for pid in media.worker_pids:
            os.kill(pid, signal.SIGSTOP)
        films = [tasks.create_task(refusal(media, film(most))) for most in range(1, 5)]
        at_once = max(workers - 1, 1)
        await until(lambda: media.stats.busy == at_once)
        for _ in range(100):
            await asyncio.sleep(0)
        assert media.stats.busy == at_once
        picture = tasks.create_task(media.load(plain()))
        await until(lambda: media.stats.busy == workers)
        for pid in media.worker_pids:
            os.kill(pid, signal.SIGCONT)
        assert (await picture).count
        assert {(await one).code for one in films} == {"unsupported_media"}


# a worker in an attacker's hands


def lie(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Make the pool start tests.process.lying_worker instead of its own worker."""
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        module = command.index("preprocessing.worker")
        told = [*command[:module], "tests.process.lying_worker", mode, *command[module + 1 :]]
        return start(told, **options)

    monkeypatch.setattr(pool.subprocess, "Popen", popen)


@contextlib.asynccontextmanager
async def after_a_lie(monkeypatch: pytest.MonkeyPatch, mode: str) -> AsyncIterator[MediaPipeline]:
    """A pipeline whose worker lies once, to what is asked first; an honest one follows."""
    lie(monkeypatch, mode)
    async with pipeline() as media:
        (pid,) = media.worker_pids
        monkeypatch.undo()
        yield media
        assert deaths(media) == 1
        assert await gone(pid)
        leaves = mode in ("half a frame", "dies at work")
        await until(lambda: kills(media) == {"exit" if leaves else "answer": 1})


@pytest.mark.parametrize(
    "mode", [*lying_worker.REPLIES, "half a frame", "endless frame", "dies at work"]
)
async def test_a_lying_worker_is_replaced(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    async with after_a_lie(monkeypatch, mode) as media:
        assert (await media.load(plain(size=(5, 5)))).count == 1


def film(most: int = 2) -> MediaPart:
    """Not a film: the workers it is sent to do not look."""
    data = base64.b64encode(b"film").decode()
    choice = FrameChoice(most)
    return MediaPart(f"data:video/mp4;base64,{data}", PARAM, kind="video", choice=choice)


@pytest.mark.parametrize("mode", lying_worker.VIDEO_REPLIES)
async def test_a_worker_that_lies_about_a_film_is_replaced(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    async with after_a_lie(monkeypatch, mode) as media:
        assert (await refusal(media, film())).code == "unsupported_media"  # by an honest one


async def test_a_long_message_of_a_worker_is_not_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (mode,) = lying_worker.LONG_REPLIES
    async with after_a_lie(monkeypatch, mode) as media:
        assert (await refusal(media, film())).code == "unsupported_media"
    assert "larger than this channel allows" in caplog.text


@pytest.mark.parametrize("mode", lying_worker.LOOK_REPLIES)
async def test_a_worker_that_lies_about_a_header_is_replaced(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    asked = plain(size=(7, 3))
    async with after_a_lie(monkeypatch, mode) as media, media.hold([asked]) as room:
        (facts,) = (await media.open(asked, room)).facts
        assert (facts.width, facts.height) == (7, 3)


async def test_what_was_opened_is_tiled_within_other_bounds() -> None:
    picture = Image.effect_noise((90, 30), 60).convert("RGB")
    asked = part(encode(picture))
    async with pipeline() as media, media.hold([asked]) as room:
        opened = await media.open(asked, room)
        assert media.stats.decoded == 0
        loaded = await media.tile(dataclasses.replace(asked, max_tiles=3), opened)
    assert isinstance(loaded, TiledMedia)
    assert (loaded.columns, loaded.rows) == (3, 1)
    assert loaded.tiles == tile(picture, TileSettings.of(GEOMETRY, 3))[0]


async def test_memory_is_held_for_what_was_fetched_not_for_what_might_have_been(
    tmp_path: Path,
) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encode(Image.new("RGB", (30, 20))))
    asked = MediaPart(file.as_uri(), PARAM)
    async with pipeline(allowed_local_media_path=str(tmp_path)) as media:
        async with hanging_job(media, asked):
            most = TileSettings.of(GEOMETRY).most_bytes
            assert media._memory.used == file.stat().st_size + most
        assert media._memory.used == 0


async def test_a_film_of_pictures_shows_the_middles_of_its_segments() -> None:
    pictures = [encode(Image.new("RGB", (40 + at, 20), (at, 0, 0))) for at in range(9)]
    urls = tuple("data:image/png;base64," + base64.b64encode(one).decode() for one in pictures)
    asked = MediaPart(urls, PARAM, kind="video", choice=FrameChoice(3))
    async with pipeline() as media:
        loaded = await media.load(asked)
        async with media.hold([asked]) as room:
            opened = await media.open(asked, room)
            again = await media.tile(asked, opened)
        assert again.spent.fetch == opened.fetch_seconds > 0
        bad = dataclasses.replace(asked, url=(*urls[:4], urls[4][:60], *urls[5:]))
        with pytest.raises(MediaRefused) as refused:
            await media.load(bad)
        assert refused.value.param == f"{PARAM}[4]"
    assert isinstance(loaded, TiledVideo)
    assert loaded == again
    assert [one.width for one in opened.facts] == list(range(40, 49))
    assert loaded.indices == (1, 4, 6)
    assert [frame.tiles[0] for frame in loaded.frames] == [1, 4, 6]
    assert all(frame.count == 1 for frame in loaded.frames)


async def test_the_same_film_is_decoded_once_and_its_frames_keep_their_names(
    tmp_path: Path,
) -> None:
    encoded = clips.encode(tmp_path / "film.mp4", ["-c:v", "libx264", "-pix_fmt", "yuv420p"])
    url = "data:video/mp4;base64," + base64.b64encode(encoded).decode()
    few, many = (MediaPart(url, PARAM, kind="video", choice=FrameChoice(most)) for most in (3, 30))
    async with pipeline(tile_cache_bytes=1 << 22) as media:
        first, again, other = [await media.load(one) for one in (few, few, many)]
        assert media.stats.decoded == 2
    assert isinstance(first, TiledVideo)
    assert isinstance(other, TiledVideo)
    assert first == again
    names = dict(zip(other.indices, (frame.digest for frame in other.frames), strict=True))
    assert [names[at] for at in first.indices] == [frame.digest for frame in first.frames]
    assert len(set(names.values())) == 30


async def test_files_that_kill_workers_do_not_close_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as lies:
        lie(lies, "dies at work")
        async with pipeline() as media:
            for _ in range(8):  # each is tried twice
                assert (await refusal(media, plain())).code == "invalid_media"
            lies.undo()
            # The worker hired before is the last that dies.
            assert (await media.load(plain())).count
            assert deaths(media) == 17


async def test_workers_that_do_not_start_are_an_error_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lie(monkeypatch, "dies at start")
    media = MediaPipeline(MediaSettings())
    with pytest.raises(Unavailable):
        await media.start(GEOMETRY)
    assert media.worker_pids == []
    await media.close()


# life and death of the whole


async def test_before_the_start_and_after_the_close_there_is_no_decoder() -> None:
    media = MediaPipeline(MediaSettings(media_workers=1))
    with pytest.raises(Unavailable):
        await media.load(plain())
    await media.start(GEOMETRY)
    (pid,) = media.worker_pids
    await media.start(GEOMETRY)
    assert media.worker_pids == [pid]
    await media.close()
    await media.close()
    assert await gone(pid)
    with pytest.raises(Unavailable):
        await media.load(plain())


async def test_closing_ends_the_job_at_work_and_those_that_wait() -> None:
    async with pipeline() as media, hanging_job(media, plain()) as (pid, at_work):
        waiting = asyncio.create_task(media.load(plain()))
        await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE):
            await media.close()
            outcomes = await asyncio.gather(at_work, waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]
        assert await gone(pid)


@pytest.mark.parametrize("stopped", [False, True])
async def test_no_worker_outlives_its_parent(stopped: bool) -> None:
    code = """
import asyncio, sys
from preprocessing import MediaPipeline
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings

async def main():
    media = MediaPipeline(MediaSettings(media_workers=2))
    await media.start(VisionGeometry(16, 1))
    print(*media.worker_pids, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = list(map(int, (await asyncio.to_thread(parent.stdout.readline)).split()))
        assert len(pids) == 2
        if stopped:  # a worker that cannot notice the closed socket
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
        parent.kill()
    for pid in pids:
        assert await gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_serving_worker_is_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_API_KEY", "secret")
    async with pipeline() as media:
        assert (await media.load(plain())).count
        (pid,) = media.worker_pids
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        assert status["Seccomp"].strip() == "2"
        assert status["NoNewPrivs"].strip() == "1"
        # When memory runs out, it goes before the server and the engine.
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
        assert int(status["CapEff"], 16) == 0
        assert int(status["Uid"].split()[0]) != 0
        with contextlib.suppress(PermissionError):
            assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()


async def test_a_missing_layer_of_the_sandbox_is_known_and_can_be_forbidden(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lie(monkeypatch, "lacks a layer")
    async with pipeline() as media:
        assert media.missing == ["landlock"]
        assert "lack sandbox layers=landlock" in caplog.text
    strict = MediaPipeline(MediaSettings(require_sandbox=True))
    with pytest.raises(Unavailable, match=r"require_sandbox.*landlock"):
        await strict.start(GEOMETRY)
    assert strict.worker_pids == []
    await strict.close()


async def test_a_worker_has_no_way_to_the_servers_log() -> None:
    code = """
import os, sys
from preprocessing import images, worker

def answer(job, encoded, honest=worker.answer):
    if encoded == b"speak":
        os.write(2, b"forged line")
        print("forged line", file=sys.stderr, flush=True)
    return honest(job, encoded)

worker.answer = answer
worker.main(int(sys.argv[1]))
"""
    ours, theirs = socket.socketpair()
    channel: Channel[FromWorker] = Channel(ours, FromWorker)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(theirs.fileno())],
        cwd=ROOT,
        pass_fds=[theirs.fileno()],
        stderr=subprocess.PIPE,
    ) as process:
        theirs.close()
        channel.send(Confine(memory=1 << 30))
        assert isinstance(channel.receive()[0], Confined)
        channel.send(
            TileJob(settings=TileSettings.of(GEOMETRY), max_pixels=100, seconds=5), [b"speak"]
        )
        assert isinstance(channel.receive()[0], Refused)
        channel.close()
        assert process.communicate(timeout=DEADLINE)[1] == b""


async def test_the_same_bytes_are_decoded_once() -> None:
    async with pipeline(tile_cache_bytes=1 << 20) as media:
        whole = part(encode(Image.new("RGB", (300, 200), "red")))
        first = await media.load(whole)
        again = await media.load(MediaPart(whole.url, "messages[7].content[0].image_url"))
        assert again == first
        assert media.stats.decoded == 1
        fewer = await media.load(MediaPart(whole.url, PARAM, 1))
        assert fewer.count == 1 < first.count
        salted = await media.load(MediaPart(whole.url, PARAM, salt=b"of another"))
        assert salted.tiles == first.tiles
        assert salted.digest != first.digest
        assert media.stats.decoded == 3
        await media.load(part(encode(Image.new("RGB", (300, 200), "blue"))))
        assert media.stats.decoded == 4


async def test_a_file_that_is_here_has_the_tiles_of_its_bytes_and_is_not_hashed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pipeline(tile_cache_bytes=1 << 20) as media:
        encoded = encode(Image.new("RGB", (300, 200), "red"))
        first = await media.load(part(encoded))
        file = File(encoded, content_digest(encoded))

        def never(_: bytes) -> bytes:
            raise AssertionError("hashed again")

        monkeypatch.setattr("preprocessing.pipeline.content_digest", never)
        asked = MediaPart(file, PARAM)
        assert not asked.is_remote
        assert await media.load(asked) == first
        opened = await media.open(asked, None)
        assert await media.tile(asked, opened) == first
        film = MediaPart((file, file), PARAM, kind="video", choice=FrameChoice(2), max_tiles=12)
        assert [frame.digest for frame in (await media.load(film)).frames] == [first.digest] * 2
        assert media.stats.decoded == 1


async def test_a_file_is_known_by_its_header_as_a_picture_or_else_a_video(tmp_path: Path) -> None:
    picture = encode(Image.new("RGB", (30, 20)))
    clips.frame(1).save(tmp_path / "a.png")
    clips.ffmpeg("-i", tmp_path / "a.png", "-pix_fmt", "yuv420p", tmp_path / "a.mp4")
    film = (tmp_path / "a.mp4").read_bytes()
    async with pipeline() as media:
        kind, facts = await media.identify(picture, "file")
        assert (kind, facts.width, facts.height) == ("image", 30, 20)
        kind, facts = await media.identify(film, "file")
        assert (kind, facts.width) == ("video", 64)
        with pytest.raises(MediaRefused, match="neither a picture nor a video") as refused:
            await media.identify(b"hello", "file")
        assert (refused.value.code, refused.value.param) == ("unsupported_media", "file")
        assert media.stats.decoded == 0
    async with pipeline(max_media_bytes=len(picture) - 1, max_video_bytes=len(film)) as media:
        assert (await media.identify(film, "file"))[0] == "video"
        with pytest.raises(MediaRefused, match="The picture has more than") as refused:
            await media.identify(picture, "file")
        assert (refused.value.code, refused.value.param) == ("media_too_large", "file")


async def test_pictures_that_come_at_once_are_decoded_once() -> None:
    async with pipeline(tile_cache_bytes=1 << 20) as media:
        asked = [plain("green") for _ in range(20)]
        found = await asyncio.gather(*map(media.load, asked))
        assert len({picture.digest for picture in found}) == 1
        assert media.stats.decoded == 1


async def test_who_gives_up_on_a_picture_leaves_it_to_the_next() -> None:
    async with pipeline(tile_cache_bytes=1 << 20) as media:
        (worker,) = media.worker_pids
        os.kill(worker, signal.SIGSTOP)
        first, second = (asyncio.create_task(media.load(plain("blue"))) for _ in range(2))
        await until(lambda: media.stats.busy == 1)
        first.cancel()
        os.kill(worker, signal.SIGCONT)
        assert (await second).width == 30
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_a_refusal_is_not_kept_and_names_the_field_of_each() -> None:
    async with pipeline(tile_cache_bytes=1 << 20) as media:
        for field in ("a", "b"):
            with pytest.raises(MediaRefused) as refused:
                await media.load(MediaPart(part(b"no picture").url, field))
            assert refused.value.param == field
