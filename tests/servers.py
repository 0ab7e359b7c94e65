"""A real server in a child process, for the tests that go through sockets."""

import base64
import contextlib
import io
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from PIL import Image, ImageDraw

# These servers are on this machine, where packages may come from behind a proxy.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "127.0.0.1", "localhost"]))

ROOT = Path(__file__).parents[1]
START_DEADLINE = 300.0
# The demo model's prompts are shorter than a block of the usual size, and what fills none is not
# cached.
SMALL_BLOCKS = ("--block-size", "16")


def free_port() -> int:
    """One below those that the kernel gives to connections and port 0, so that nothing takes it
    before the server does; nor do other processes that run tests, which draw from others."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 16
    while True:
        port = 10_000 + 16 * secrets.randbelow(22_768 // 16) + worker
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Server:
    """``python -m server`` with some flags; ready when the constructor returns.

    ``module`` is run in its place, by ``python``. ``trust`` is what to check its certificate with,
    if it has one. ``at`` is where it listens: by default somewhere free.
    """

    def __init__(
        self,
        log: Path,
        flags: Sequence[str] = (),
        module: str = "server",
        environment: Mapping[str, str] | None = None,
        trust: ssl.SSLContext | None = None,
        python: str = sys.executable,
        at: tuple[str, int] | None = None,
    ) -> None:
        host, self.port = at or ("127.0.0.1", free_port())
        self.url = f"{'http' if trust is None else 'https'}://{host}:{self.port}"
        place = ("--host", host, "--port", str(self.port))
        self.trust: ssl.SSLContext | bool = trust or True
        self.log = log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [python, "-m", module, *place, *SMALL_BLOCKS, *flags],
                cwd=ROOT,
                stdout=sink,
                stderr=sink,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            )
        try:
            self.wait_for_status("/ready", 200)
        except BaseException:
            self.close()
            raise

    def wait_for_status(self, path: str, status: int, deadline: float = START_DEADLINE) -> None:
        """Poll until ``path`` answers ``status``; fails when the process ends before."""
        last: object = None
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            try:
                last = httpx.get(self.url + path, timeout=60, verify=self.trust).status_code
            except httpx.TransportError as error:
                last = error
            if last == status:
                return
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            time.sleep(0.05)
        raise AssertionError(
            f"{path} never answered {status}, last {last}:\n{self.log.read_text()}"
        )

    def wait_for_metric(self, name: str, value: float, deadline: float = 60.0) -> None:
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            if self.metric(name) == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} is {self.metric(name)}, never became {value}")

    def metric(self, name: str) -> float | None:
        """Its value, or that of the first with this name; a name may hold its labels."""
        page = httpx.get(self.url + "/metrics", timeout=60, verify=self.trust).text
        for line in page.splitlines():
            if name in (line.rsplit(" ", 1)[0], line.split("{")[0].split(" ")[0]):
                return float(line.rsplit(" ", 1)[1])
        return None

    def children(self, module: str) -> list[int]:
        """Process ids of this server's children that run ``python -m module``."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except (OSError, IndexError):
                continue
            if parent == self.process.pid and module in words:
                found.append(int(entry.name))
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Its engine stands still, so that no answer ends by itself."""
        (engine,) = self.children("engine")
        os.kill(engine, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(engine, signal.SIGCONT)

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=self.url + "/v1", api_key="test", max_retries=0, **options)

    def ask(self, *content: Any, stream: bool = False, **options: Any) -> str:
        """One user turn; strings are text parts, pictures become data: URIs."""
        messages: Any = [{"role": "user", "content": [part(item) for item in content]}]
        options = {"model": "internvl-demo", "temperature": 0, "max_tokens": 64} | options
        with self.client() as client:
            answer = client.chat.completions.create(messages=messages, stream=stream, **options)
            if stream:
                return "".join(
                    chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices
                )
            return answer.choices[0].message.content or ""

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def encode(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def data_uri(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def part(item: Any) -> dict[str, Any]:
    if isinstance(item, Image.Image):
        item = data_uri(encode(item))
    if isinstance(item, str) and item.startswith(("data:", "http:", "https:")):
        return {"type": "image_url", "image_url": {"url": item}}
    return {"type": "text", "text": item} if isinstance(item, str) else dict(item)


COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
}
SHAPES = ("circle", "square", "triangle")


def draw(
    colour: str, shape: str, size: tuple[int, int] = (112, 112), background: Any = "white"
) -> Image.Image:
    """One shape in the middle of a plain background, drawn with Pillow only."""
    picture = Image.new("RGB", size, background)
    pen = ImageDraw.Draw(picture)
    side = min(size) // 2
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    box = (left, top, left + side, top + side)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        corners = [(left, top + side), (left + side, top + side), (left + side // 2, top)]
        pen.polygon(corners, fill=COLOURS[colour])
    return picture
