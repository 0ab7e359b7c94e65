"""An engine and a media pipeline that do exactly what a test tells them."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence

from preprocessing.budget import Budget, Share
from preprocessing.grid import tile_count
from preprocessing.media import (
    Facts,
    Kind,
    Loaded,
    MediaPart,
    Opened,
    PictureFacts,
    Spent,
    TiledMedia,
    TiledVideo,
    TileSettings,
    VideoFacts,
)
from preprocessing.pool import MediaStats
from tests.small_tokenizer import encode_rendered, reference
from wire.channel import Buffer
from wire.errors import MediaRefused, ServiceError, Unavailable
from wire.geometry import PromptFormat, VisionGeometry
from wire.histogram import TOKEN_SECONDS, Histogram
from wire.messages import EngineOutput, EngineRequest, EngineStats, Progress, Ready

CHINESE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
HF = PromptFormat(template="hf", system=None, number_images=False)
CHAT = PromptFormat(template="internvl2_5", system=CHINESE, number_images=True)
EOS = encode_rendered("<|im_end|>")[0]

Step = list[int] | EngineOutput | asyncio.Event | Exception
Script = Callable[[EngineRequest], Iterable[Step]]


def make_ready(
    template: PromptFormat = HF, max_model_len: int = 512, *, speculates: bool = True
) -> Ready:
    return Ready(
        geometry=VisionGeometry(tile_size=4, tokens_per_tile=3),
        prompt_format=template,
        max_model_len=max_model_len,
        max_positions=max_model_len,
        vocab_size=reference().get_vocab_size(),
        eos_token_ids=(EOS,),
        block_size=16,
        blocks_total=64,
        device="cpu",
        dtype="float32",
        attention="sdpa",
        parameters=1000,
        grammars=True,
        speculates=speculates,
    )


def say(text: str, *, finish: str = "stop", cached: int = 0) -> Script:
    """Write ``text`` token by token, then end."""

    def script(request: EngineRequest) -> Iterable[Step]:
        for token in encode_rendered(text):
            yield EngineOutput(request.id, [token], cached_tokens=cached)
        if finish == "stop":
            yield EngineOutput(request.id, [EOS], "stop", EOS, cached)
        else:
            yield EngineOutput(request.id, [], finish, None, cached, "details for the log")

    return script


class FakeEngine:
    """Plays ``script``. ``requests``, ``buffers`` and ``aborted`` tell what was asked of it."""

    def __init__(self, ready: Ready | None = None, script: Script | None = None) -> None:
        self.state = "starting"
        self.progress: Progress | None = Progress("weights", 1, 2)
        self.ready: Ready | None = None
        self.stats = EngineStats(running=1, waiting=2, blocks_used=3, blocks_total=64)
        self.past = EngineStats()
        self.pid: int | None = None
        self.gaps = Histogram(TOKEN_SECONDS)
        self.restarts = self.resumed = 0
        self.faults = {"load": 0, "step": 0, "hang": 0, "exit": 0}
        self.convicted = 0
        self.script = script or say("A red circle.")
        self.requests: list[EngineRequest] = []
        self.buffers: list[Sequence[Buffer]] = []
        self.aborted: list[str] = []
        self.abort_seen = asyncio.Event()
        self.load = asyncio.Event()  # a test that clears it decides when loading ends
        self.load.set()
        self.fails_to_load = False
        self.flushed = 0
        self.level = ""
        self._open: set[str] = set()
        self._ended: dict[str, ServiceError] = {}
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._ending: Callable[[], ServiceError] = lambda: Unavailable("the server is stopping")
        self._facts = ready or make_ready()

    async def start(self) -> None:
        pass

    async def wait_ready(self) -> Ready:
        await self.load.wait()
        if self.fails_to_load:
            self.state = "failed"
            raise Unavailable("the engine could not be started")
        self.state, self.ready = "ready", self._facts
        return self._facts

    async def submit(
        self, request: EngineRequest, buffers: Sequence[Buffer] = ()
    ) -> AsyncGenerator[EngineOutput, None]:
        self.requests.append(request)
        self.buffers.append(list(buffers))
        finished = False
        self._open.add(request.id)
        try:
            for step in self.script(request):
                self._check(request.id)
                while isinstance(step, asyncio.Event) and not step.is_set():
                    await self._wait(step)
                    self._check(request.id)
                if isinstance(step, asyncio.Event):
                    continue
                if isinstance(step, Exception):
                    finished = True
                    raise step
                output = step if isinstance(step, EngineOutput) else EngineOutput(request.id, step)
                finished = output.finish_reason is not None
                yield output
                await asyncio.sleep(0)
        finally:
            self._open.discard(request.id)
            if not finished:
                self.aborted.append(request.id)
                self.abort_seen.set()

    def _check(self, identity: str) -> None:
        if identity in self._ended:
            raise self._ended[identity]

    async def _wait(self, step: asyncio.Event) -> None:
        stopping = self._stopping
        events = (step, stopping, self._wake)
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if stopping.is_set():
            raise self._ending()

    def abort(self, identity: str, error: ServiceError) -> bool:
        known = identity in self._open
        if known:
            self._ended[identity] = error
            wake, self._wake = self._wake, asyncio.Event()
            wake.set()
        return known

    def abort_all(self, make_error: Callable[[], ServiceError]) -> int:
        count, self._ending = len(self._open), make_error
        self._stopping.set()
        self._stopping = asyncio.Event()
        return count

    def flush(self) -> None:
        self.flushed += 1

    async def profile(self, seconds: float, of: str = "engine") -> bytes:
        return f"{seconds} seconds of a script's {of}".encode()

    def set_log_level(self, level: str) -> None:
        self.level = level

    async def stop(self) -> None:
        self.state = "stopped"
        self._stopping.set()


class FakeMedia:
    """Every URL is a picture of two tiles, or one at detail "low"; "bad" ones are refused. Where
    headers are read it is 8 pixels by 4. A video has ten frames in ten seconds."""

    def __init__(self) -> None:
        self.parts: list[MediaPart] = []
        self.cancelled = self.tiled = self.forgotten = 0
        self.room = Budget(1 << 20)  # of uploads on their way
        self.gate = asyncio.Event()
        self.gate.set()
        self.geometry: VisionGeometry | None = None
        self.closed = False
        self.missing: list[str] = []
        self.stats = MediaStats()
        self.spent = Spent(0.25, 0.125, 0.25, 0.125)

    async def start(self, geometry: VisionGeometry) -> None:
        self.geometry = geometry

    async def load(self, part: MediaPart) -> Loaded:
        if part.kind == "video":
            async with self.hold([part]) as room:
                return await self.tile(part, await self.open(part, room))
        await self._arrive(part)
        return self._picture(part, 1 if part.max_tiles == 1 else 2)

    @property
    def most_arriving(self) -> int:
        return self.room.total

    def arriving(self) -> contextlib.AbstractAsyncContextManager[Share]:
        return self.room.share(0)

    async def identify(self, encoded: bytes, param: str) -> tuple[Kind, Facts]:
        """By their first bytes: what begins with "bad" is nothing, with "film" a video."""
        await self.gate.wait()
        if encoded.startswith(b"bad"):
            raise MediaRefused("The file is neither.", param=param, code="unsupported_media")
        if encoded.startswith(b"film"):
            return "video", VideoFacts("mp4", "h264", 8, 4, 0, frames=10, duration=10.0, fps=1.0)
        return "image", PictureFacts("PNG", 8, 4)

    @contextlib.asynccontextmanager
    async def hold(self, parts: Sequence[MediaPart]) -> AsyncIterator[Share | None]:
        yield None

    async def open(self, part: MediaPart, room: Share | None, *, look: bool = True) -> Opened:
        await self._arrive(part)
        if not look and part.choice is None:
            return Opened((b"",), (), self.spent.fetch)
        picture = PictureFacts("PNG", 8, 4)
        if isinstance(part.url, tuple):
            return Opened((b"",) * len(part.url), (picture,) * len(part.url), self.spent.fetch)
        video = VideoFacts("mp4", "h264", 8, 4, 0, frames=10, duration=10.0, fps=1.0)
        return Opened((b"",), (picture if part.kind == "image" else video,), self.spent.fetch)

    async def tile(self, part: MediaPart, opened: Opened) -> Loaded:
        assert self.geometry is not None
        self.tiled += 1
        if part.choice is None and not opened.facts:
            return self._picture(part, 1 if part.max_tiles == 1 else 2)
        count = tile_count(8, 4, TileSettings.for_part(self.geometry, part))
        if part.choice is None:
            return self._picture(part, count)
        facts = opened.facts[0]
        most = min(part.choice.most, facts.frames if len(opened.facts) == 1 else len(opened.facts))
        frames = tuple(self._picture(part, count, str(index)) for index in range(most))
        seconds = tuple(map(float, range(most))) if isinstance(facts, VideoFacts) else ()
        film = facts if isinstance(facts, VideoFacts) else None
        digest = hashlib.sha256(f"{part.url} {most} {count}".encode()).digest()
        return TiledVideo(digest, frames, tuple(range(most)), seconds, film, self.spent)

    async def _arrive(self, part: MediaPart) -> None:
        self.parts.append(part)
        if "bad" in str(part.url):
            raise MediaRefused("The picture is damaged or truncated.", param=part.param)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def _picture(self, part: MediaPart, count: int, frame: str = "") -> TiledMedia:
        assert self.geometry is not None
        digest = hashlib.sha256(f"{part.url} {count} {frame}".encode()).digest()
        tiles = bytes(count * self.geometry.tile_bytes)
        return TiledMedia(digest, tiles, count, count, 1, 8, 4, self.spent)

    def forget(self) -> None:
        self.forgotten += 1

    async def close(self) -> None:
        self.closed = True
