"""Mixed traffic for long, and the memory of each process meanwhile. ``tests/e2e/test_soak.py`` runs
some of it in every build, ``benchmarks/soak.py`` all of it.

Requests come in rounds. Between two rounds nothing runs, and that is when memory is looked at:
what is held then is kept for good, or is a cache, and caches are made small enough to be full
before the first look that counts. A new kind of request is one more function in ``KINDS``.
"""

import asyncio
import collections
import contextlib
import dataclasses
import io
import itertools
import os
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tests.clips import encode
from tests.servers import Server, data_uri

# Caches that are full after a few hundred requests, and places enough for all that come at once.
FLAGS = (
    *("--allow-private-media", "--allowed-media-ports", ""),
    *("--tile-cache-bytes", str(2 << 20)),
    *("--encoder-cache-bytes", str(1 << 20)),
    *("--num-kv-blocks", "512"),
    *("--media-workers", "2"),
)
# format -> modes it is written in, and how
FORMATS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "PNG": (("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), {"compress_level": 1}),
    "JPEG": (("RGB", "L", "CMYK"), {}),
    "WEBP": (("RGB", "RGBA"), {"method": 0}),
    "GIF": (("P", "L", "RGB"), {}),
    "BMP": (("RGB", "RGBA", "L", "1"), {}),
    "TIFF": (("RGB", "RGBA", "L", "CMYK", "I;16", "F"), {}),
    "AVIF": (("RGB", "RGBA"), {"speed": 10}),
    "JPEG2000": (("RGB", "L"), {}),
    "PPM": (("RGB", "L", "1"), {}),
    "TGA": (("RGB", "RGBA"), {}),
    "PCX": (("RGB", "P"), {}),
    "SGI": (("RGB", "L"), {}),
}
# name of a file -> how ffmpeg makes it
CLIPS = {
    "a.mp4": ["-c:v", "libx264", "-pix_fmt", "yuv420p"],
    "b.mp4": ["-c:v", "mpeg4"],
    "c.webm": ["-c:v", "libvpx", "-b:v", "200k"],
    "d.mkv": ["-c:v", "mjpeg", "-pix_fmt", "yuvj420p"],
    "e.gif": [],
}
SENT_AGAIN = 20  # pictures


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request, and the only statuses that it may get. A client with ``patience`` leaves after so
    many seconds."""

    body: dict[str, Any]
    statuses: tuple[int, ...] = (200,)
    patience: float | None = None


class Maker:
    """Makes requests; ``random`` decides everything but what the clock does."""

    def __init__(self, seed: int, site: str, clips: Sequence[bytes] = ()) -> None:
        self.random = random.Random(seed)
        self.site = site
        self.clips = clips
        self._sent_before = [self.new_picture() for _ in range(SENT_AGAIN)]

    def ask(self) -> tuple[str, Ask]:
        """A request of some kind, and the kind's name."""
        (kind,) = self.random.choices(list(KINDS), list(KINDS.values()))
        return kind.__name__, kind(self)

    def encoded(self) -> bytes:
        """A picture that nobody has seen: 1 to 300 pixels each way, small ones more often."""
        form = self.random.choice(list(FORMATS))
        modes, options = FORMATS[form]
        mode = self.random.choice(modes)
        width, height = (int(300 ** self.random.random()) for _ in range(2))
        picture = Image.new("RGB", (width, height), self._colour())
        for _ in range(4):
            left, top = self.random.randrange(width), self.random.randrange(height)
            picture.paste(self._colour(), (left, top, left + width // 3 + 1, top + height // 2 + 1))
        if mode == "I;16":
            picture = picture.convert("I").point(lambda value: value * 256)
        picture = picture.convert(mode)
        sink = io.BytesIO()
        picture.save(sink, form, **options)
        return sink.getvalue()

    def _colour(self) -> tuple[int, ...]:
        return tuple(self.random.randrange(256) for _ in range(3))

    def new_picture(self) -> str:
        return data_uri(self.encoded())

    def picture(self) -> str:
        """The URL of one: half of them were sent before, some lie on a site."""
        if self.random.random() < 0.5:
            return self.random.choice(self._sent_before)
        if self.random.random() < 0.2:
            return f"{self.site}/{self.random.randrange(1 << 40)}"
        return self.new_picture()

    def body(
        self, *urls: str, video: dict[str, Any] | None = None, **fields: Any
    ) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        for url in urls:
            detail = self.random.choice(("low", "auto", "high"))
            content.append({"type": "image_url", "image_url": {"url": url, "detail": detail}})
        if video is not None:
            content.append({"type": "video_url", "video_url": video})
        content.append({"type": "text", "text": f"What is this? {self.random.randrange(1000)}"})
        sampling = {"max_tokens": self.random.randint(1, 4), "temperature": 1.0}
        stream = self.random.random() < 0.4
        return {
            "messages": [{"role": "user", "content": content}],
            "stream": stream,
            **sampling,
            **fields,
        }


def one_picture(make: Maker) -> Ask:
    return Ask(make.body(make.picture()))


def several_pictures(make: Maker) -> Ask:
    return Ask(make.body(*(make.picture() for _ in range(make.random.randint(2, 4)))))


def several_choices(make: Maker) -> Ask:
    return Ask(make.body(make.picture(), n=make.random.randint(2, 3), logprobs=True))


def one_video(make: Maker) -> Ask:
    url = film(make.random.choice(make.clips))
    start = make.random.choice((None, make.random.random() / 4))
    video = {"url": url, "num_frames": make.random.randint(1, 6), "start": start}
    return Ask(make.body(video=video))


def video_of_pictures(make: Maker) -> Ask:
    frames = [make.picture() for _ in range(make.random.randint(1, 4))]
    return Ask(make.body(video={"frames": frames}))


def broken_video(make: Maker) -> Ask:
    clip = make.random.choice(make.clips)
    url = film(clip[: make.random.randrange(len(clip))])
    # Some containers can be read as far as they go.
    return Ask(make.body(video={"url": url}), (400, 200))


def no_picture(make: Maker) -> Ask:
    return Ask(make.body())


def broken_picture(make: Maker) -> Ask:
    encoded = make.encoded()
    noise = make.random.randbytes(make.random.randrange(1, 2000))
    bad = make.random.choice(
        (
            data_uri(encoded[: len(encoded) // 2]),
            data_uri(noise),
            data_uri(encoded[:8] + noise),
            data_uri(b""),
            data_uri(encoded)[:-3] + "!",
            f"{make.site}/cut",
            f"{make.site}/missing",
            f"{make.site}/round",
            "http://169.254.169.254:1/",
        )
    )
    # Half of a picture can be a whole one: a format may end with padding.
    return Ask(make.body(make.picture(), bad), (400, 200))


def client_that_leaves(make: Maker) -> Ask:
    urls = [make.picture(), f"{make.site}/slow"][: make.random.randint(1, 2)]
    return Ask(
        make.body(*urls, max_tokens=400, ignore_eos=True),
        patience=make.random.random() * 0.3,
    )


KINDS: dict[Callable[[Maker], Ask], float] = {
    one_picture: 50,
    several_pictures: 10,
    several_choices: 10,
    one_video: 6,
    video_of_pictures: 4,
    broken_video: 3,
    no_picture: 5,
    broken_picture: 15,
    client_that_leaves: 10,
}


def film(clip: bytes) -> str:
    return data_uri(clip, "video/mp4")


def make_clips() -> list[bytes]:
    """Half a second of video in each of ``CLIPS``."""
    with tempfile.TemporaryDirectory() as folder:
        return [encode(Path(folder) / name, how, 12) for name, how in CLIPS.items()]


@contextlib.asynccontextmanager
async def site(seed: int) -> AsyncIterator[str]:
    """A web site on this machine with a picture for each path, and some paths that go wrong."""
    maker = Maker(seed, "")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1]
            body = maker.encoded()
            status, length = b"200 OK", len(body)
            if path == b"/missing":
                status = b"404 Not Found"
            elif path == b"/round":
                status = b"302 Found\r\nLocation: /round"
            elif path == b"/cut":
                length += 100
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, length))
            if path == b"/slow":
                await writer.drain()
                await reader.read()  # until the client leaves
            writer.write(body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@dataclasses.dataclass
class Report:
    """What a run found. ``anonymous`` has, by process, its bytes behind each round: memory of its
    own that is resident or swapped out, files such as its libraries not counted."""

    requests: int
    per_round: int
    outcomes: collections.Counter[str]
    anonymous: dict[str, list[int]]
    threads: dict[str, list[int]]
    descriptors: dict[str, list[int]]

    def slope(self, name: str, warm_up: int) -> float:
        """Bytes per 1,000 requests behind the first ``warm_up``: the median of the slopes between
        any two rounds, which single steps up or down do not move."""
        kept = list(enumerate(self.anonymous[name]))[warm_up // self.per_round :]
        slopes = [(b - a) / (j - i) for (i, a), (j, b) in itertools.combinations(kept, 2)]
        return statistics.median(slopes) * 1000 / self.per_round


class Soak:
    """Drives one server."""

    def __init__(self, server: Server, *, seed: int = 0, at_once: int = 16) -> None:
        self._server = server
        self._seed = seed
        self._at_once = at_once
        self._outcomes: collections.Counter[str] = collections.Counter()

    async def run(self, requests: int, per_round: int = 100) -> Report:
        """Send ``requests`` in rounds; looks at every process behind each."""
        report = Report(requests, per_round, self._outcomes, {}, {}, {})
        limits = httpx.Limits(max_connections=self._at_once)
        async with (
            site(self._seed + 1) as address,
            httpx.AsyncClient(base_url=self._server.url, limits=limits, timeout=120) as client,
        ):
            maker = Maker(self._seed, address, await asyncio.to_thread(make_clips))
            for _ in range(requests // per_round):
                asks = iter([maker.ask() for _ in range(per_round)])
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._at_once):
                        group.create_task(self._client(client, asks))
                await asyncio.to_thread(idle, self._server)
                self._look(report)
        return report

    async def _client(self, client: httpx.AsyncClient, asks: Iterator[tuple[str, Ask]]) -> None:
        for kind, ask in asks:
            try:
                async with asyncio.timeout(ask.patience):
                    answer = await client.post("/v1/chat/completions", json=ask.body)
            except TimeoutError:
                assert ask.patience is not None
                self._outcomes[f"{kind}: left"] += 1
                continue
            self._outcomes[f"{kind}: {answer.status_code}"] += 1
            assert answer.status_code in ask.statuses, (kind, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]
            elif ask.body["stream"]:
                assert answer.text.endswith("data: [DONE]\n\n"), answer.text
                assert '"error"' not in answer.text
            else:
                assert answer.json()["usage"]["completion_tokens"]

    def _look(self, report: Report) -> None:
        for name, pid in self.processes().items():
            status = (Path("/proc") / str(pid) / "status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            used = sum(int(fields[key].split()[0]) for key in ("RssAnon", "VmSwap"))
            report.anonymous.setdefault(name, []).append(used * 1024)
            report.threads.setdefault(name, []).append(int(fields["Threads"]))
            with contextlib.suppress(PermissionError):  # the decode workers hide theirs
                opened = len(os.listdir(f"/proc/{pid}/fd"))
                report.descriptors.setdefault(name, []).append(opened)

    def processes(self) -> dict[str, int]:
        """Process ids of the server and everything it runs; a worker is named by its own."""
        found = {"api": self._server.process.pid}
        (found["engine"],) = self._server.children("engine")
        for pid in self._server.children("preprocessing.worker"):
            found[f"decoder {pid}"] = pid
        return found


def idle(server: Server) -> None:
    """Wait until nothing is held for any request."""
    for name in (
        "internvl_requests_in_flight",
        "internvl_num_requests_running",
        "internvl_num_requests_waiting",
        "internvl_kv_blocks_used",
        "internvl_request_tile_bytes",
        "internvl_decode_workers_busy",
    ):
        server.wait_for_metric(name, 0)
