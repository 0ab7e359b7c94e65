"""An engine and a media pipeline that do exactly what a test tells them."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from preprocessing.media import MediaPart, TiledMedia
from preprocessing.pool import PoolStats
from tests.small_tokenizer import encode_rendered, reference
from wire.channel import Buffer
from wire.errors import MediaRefused, Unavailable
from wire.geometry import PromptFormat, VisionGeometry
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


def make_ready(template: PromptFormat = HF, max_model_len: int = 512) -> Ready:
    return Ready(
        geometry=VisionGeometry(tile_size=4, tokens_per_tile=3),
        prompt_format=template,
        max_model_len=max_model_len,
        vocab_size=reference().get_vocab_size(),
        eos_token_ids=(EOS,),
        block_size=16,
        blocks_total=64,
        device="cpu",
        dtype="float32",
        attention="sdpa",
        parameters=1000,
        grammars=True,
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
        self.restarts = 0
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
        self._stopping = asyncio.Event()
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
        try:
            for step in self.script(request):
                if isinstance(step, asyncio.Event):
                    await self._wait(step)
                    continue
                if isinstance(step, Exception):
                    finished = True
                    raise step
                output = step if isinstance(step, EngineOutput) else EngineOutput(request.id, step)
                finished = output.finish_reason is not None
                yield output
                await asyncio.sleep(0)
        finally:
            if not finished:
                self.aborted.append(request.id)
                self.abort_seen.set()

    async def _wait(self, step: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (step, self._stopping)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._stopping.is_set():
            raise Unavailable("the server is stopping")

    async def stop(self) -> None:
        self.state = "stopped"
        self._stopping.set()


class FakeMedia:
    """Every URL is a picture of two tiles, or one at detail "low"; "bad" ones are refused."""

    def __init__(self) -> None:
        self.parts: list[MediaPart] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.geometry: VisionGeometry | None = None
        self.closed = False
        self.missing: list[str] = []
        self.stats = PoolStats()
        self.times = 0.25, 0.5  # to fetch, to tile

    async def start(self, geometry: VisionGeometry) -> None:
        self.geometry = geometry

    async def load(self, part: MediaPart) -> TiledMedia:
        self.parts.append(part)
        if "bad" in part.url:
            raise MediaRefused("The picture is damaged or truncated.", param=part.param)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        assert self.geometry is not None
        count = 1 if part.max_tiles == 1 else 2
        digest = hashlib.sha256(f"{part.url} {count}".encode()).digest()
        tiles = bytes(count * self.geometry.tile_bytes)
        return TiledMedia(digest, tiles, count, count, 1, 8, 4, *self.times)

    async def close(self) -> None:
        self.closed = True
