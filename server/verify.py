"""``internvl verify``: fixed conversations through this server's own pipeline and through
transformers', and how they differ.

Pictures are decoded and tiled by the decode workers, prompts built as for any request, and the
engine computes them in a process of its own. Another process then does the same with transformers
(``engine.compare``), so that one model is in memory at a time.
"""

import asyncio
import base64
import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image, ImageDraw

from preprocessing import MediaPipeline
from preprocessing.budget import Budget, Share
from server.auth import ANYBODY
from server.chat.prepare import PreparedChat, ServedModel, prepare
from server.files import FileStore
from server.grammars import GrammarChecker
from server.schemas.chat import ChatRequest
from server.schemas.common import ImageUsage
from wire.cases import CASES, FOUND, Case, Cases, Found, Outcome, Picture
from wire.errors import ServiceError
from wire.messages import Ready
from wire.settings import Settings
from wire.tokenizer_file import TokenizerError

EXIT_DIFFERS, EXIT_FAILED = 1, 2

# Width and height. The first ones are computed, and few tiles of a usual size; the others are of
# every kind of grid, and only tiled.
Size = tuple[int, int]
CASES_OF: dict[str, tuple[str, list[Size], list[Size]]] = {
    "text": ("How many moons has Jupiter? 木星有多少颗卫星？ \N{RINGED PLANET}", [], []),
    "picture": ("What is in this picture?", [(300, 300)], []),
    "wide picture": ("Read the text.", [(640, 320)], []),
    "two pictures": ("Which of the two is larger, and why?", [(250, 260), (200, 600)], []),
    "frames": ("What happens?", [], [(320, 180), (320, 180)]),
}
TILED: list[Size] = [
    (1, 1), (5, 700), (37, 911), (448, 448), (449, 448), (640, 480), (800, 600), (1000, 333),
    (1080, 1920), (1280, 720), (1654, 2339), (2480, 3508), (3000, 400),
]  # fmt: skip


def picture(size: Size, seed: int) -> Image.Image:
    """One with slopes, edges and letters, the same everywhere."""
    across = Image.linear_gradient("L").rotate(90 * seed).resize(size)
    inside = Image.radial_gradient("L").resize(size)
    down = Image.linear_gradient("L").rotate(90 * seed + 90).resize(size)
    found = Image.merge("RGB", (across, inside, down))
    draw = ImageDraw.Draw(found)
    width, height = size
    for step in range(8):
        at = (step * 37 + seed * 61) % 100 / 100
        box = [at * width / 2, at * height / 2, (at + 1) * width / 2, (at + 1) * height / 2]
        colour = (step * 31 % 256, step * 67 % 256, (step + seed) * 101 % 256)
        (draw.ellipse if step % 2 else draw.rectangle)(box, outline=colour, width=1 + step % 3)
    draw.text((width / 8, height / 3), f"InternVL {width} x {height}", fill=(255, 255, 255))
    return found


def verify(
    settings: Settings, against: Path, names: Sequence[str], tokens: int, out: Path | None
) -> int:
    """Print what was found of the cases of these names, and write it to ``out``; 1 if something is
    out of bounds, 2 if it cannot be computed."""
    # Nothing that was begun outlives this process.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="internvl-verify-") as name:
        work = Path(name)
        try:
            done = _compute(settings, names, tokens, work)
        except (ServiceError, TokenizerError) as error:
            print(f"this cannot be served: {error}", file=sys.stderr)
            done = False
        told = msgspec.json.encode(settings.engine).decode()
        if done:
            with _running("engine.compare", told, str(against), name) as theirs:
                done = theirs.wait() == 0
        if not done:
            return EXIT_FAILED
        found = msgspec.msgpack.decode((work / FOUND).read_bytes(), type=Found)
    print("\n".join(describe(found)))
    if out is not None:
        values = {"model": str(settings.engine.model), "against": str(against)}
        values |= msgspec.to_builtins(found)
        out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return EXIT_DIFFERS if any(outcome.wrong for outcome in found.outcomes) else 0


def _compute(settings: Settings, names: Sequence[str], tokens: int, work: Path) -> bool:
    """Our side; whether it is done. Raises ServiceError, TokenizerError."""
    told = msgspec.json.encode(settings.engine).decode()
    with _running("engine.verify", told, str(work), pipe=subprocess.PIPE) as ours:
        assert ours.stdin is not None and ours.stdout is not None  # noqa: S101, PT018
        line = ours.stdout.readline()
        if line:
            ready = msgspec.json.decode(line, type=Ready)
            cases = asyncio.run(prepared(settings, ready, names, tokens))
            (work / CASES).write_bytes(msgspec.msgpack.encode(Cases(ready, cases)))
            with contextlib.suppress(BrokenPipeError):  # its status tells
                ours.stdin.write(b"go\n")
                ours.stdin.flush()
        return ours.wait() == 0


@contextlib.contextmanager
def _running(
    module: str, *arguments: str, pipe: int | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of ours, which whatever ends the block early ends too. ``pipe`` is its standard
    input and output."""
    # transformers would ask a hub about a folder that is here, and speak of things in general.
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, env=os.environ | quiet, stdin=pipe, stdout=pipe) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


async def prepared(
    settings: Settings, ready: Ready, names: Sequence[str], tokens: int
) -> list[Case]:
    """The cases as the server would send them to its engine."""
    model = ServedModel.load("verified", 0, ready, settings)
    media = MediaPipeline(settings.media)
    await media.start(ready.geometry)
    try:
        return [await _case(*given, settings, model, media, tokens) for given in _given(names)]
    finally:
        await media.close()


def _given(names: Sequence[str]) -> Iterator[tuple[str, str, list[Size], list[Size], bool]]:
    for name in names:
        text, pictures, frames = CASES_OF[name]
        yield name, text, pictures, frames, True
    for width, height in TILED:
        yield f"{width} x {height}", "What is this?", [(width, height)], [], False


async def _case(
    name: str,
    text: str,
    pictures: list[Size],
    frames: list[Size],
    computed: bool,
    settings: Settings,
    model: ServedModel,
    media: MediaPipeline,
    tokens: int,
) -> Case:
    drawn = [picture(size, seed) for seed, size in enumerate(pictures + frames)]
    shown, seen = drawn[: len(pictures)], drawn[len(pictures) :]
    chat = await _prepare(_request(text, shown, seen, tokens), name, settings, model, media)
    raw = [Picture(one.width, one.height, one.tobytes()) for one in drawn]
    grids = [one.facts.grid for one in chat.shown if isinstance(one.facts, ImageUsage)]
    return Case(
        name=name,
        text=text,
        pictures=raw[: len(pictures)],
        frames=raw[len(pictures) :],
        computed=computed,
        # Nothing of another case may be found in a cache: all positions are looked at.
        request=msgspec.structs.replace(chat.engine, cache_salt=name.encode()),
        buffers=[bytes(buffer) for buffer in chat.buffers],
        grids=grids,
    )


def _request(
    text: str, pictures: Sequence[Image.Image], frames: Sequence[Image.Image], tokens: int
) -> ChatRequest:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _url(one)}} for one in pictures
    ]
    if frames:
        urls = [_url(one) for one in frames]
        parts.append({"type": "video_url", "video_url": {"frames": urls}})
    parts.append({"type": "text", "text": text})
    return ChatRequest.model_validate(
        {
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": tokens,
            # Whatever the checkpoint would rather have.
            "temperature": 0,
            "repetition_penalty": 1,
        }
    )


def _url(shown: Image.Image) -> str:
    file = io.BytesIO()
    shown.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


async def _prepare(
    request: ChatRequest,
    name: str,
    settings: Settings,
    model: ServedModel,
    media: MediaPipeline,
) -> PreparedChat:
    tiles = Budget(1 << 40)

    async def run(function: Any, /, *arguments: Any) -> Any:
        return function(*arguments)

    async with contextlib.AsyncExitStack() as held:

        async def room(size: int, /, *, beside: int = 0) -> Share:
            return await held.enter_async_context(tiles.share(size))

        return await prepare(
            request,
            name,
            model,
            media,
            settings.media,
            GrammarChecker(),
            run,
            ANYBODY,
            FileStore(0, 1.0, lambda _: None),
            room,
        )


def describe(found: Found) -> Iterator[str]:
    """The table, what is wrong, and by which bounds."""
    heads = ("case", "tiles", "grids", "pixels", "prompt", "logits", "of their deviation", "greedy")
    rows = [heads, *(_row(outcome) for outcome in found.outcomes)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    yield ""
    kind = found.dtype + ("" if found.quantization == "none" else f", {found.quantization}")
    yield f"Computed in {kind}. In bounds are: tiles, pixels and prompts that are equal;"
    yield f"{found.bounds};"
    yield "and greedy tokens that are equal, up to one as likely as those bounds leave unsure."
    yield from (f"Note: {note}." for note in found.notes)
    exact = [o.logits for o in found.outcomes if o.logits is not None and o.logits.theirs_exact]
    if exact:
        divergence = sum(one.divergence for one in exact) / len(exact)
        agreement = sum(one.agreement for one in exact) / len(exact)
        ours = math.sqrt(sum(one.ours_exact**2 for one in exact) / len(exact))
        theirs = math.sqrt(sum(one.theirs_exact**2 for one in exact) / len(exact))
        yield (
            f"From transformers' float32: ours {ours:.2g}, theirs {theirs:.2g} (root mean square); "
            f"divergence {divergence:.2g} nats, the same likeliest token at {agreement:.1%}."
        )
    wrong = [(outcome.name, text) for outcome in found.outcomes for text in outcome.wrong]
    yield from (f"WRONG  {name}: {text}" for name, text in wrong)
    yield "Something differs." if wrong else "All in bounds."


def _row(outcome: Outcome) -> tuple[str, ...]:
    logits = outcome.logits
    grids = ",".join(f"{columns}x{rows}" for columns, rows in outcome.grids[0])
    greedy = ""
    if outcome.tokens:
        greedy = f"{outcome.greedy} of {outcome.tokens}"
        if outcome.margin is not None:
            greedy += f" (then by {outcome.margin:.2g})"
    return (
        outcome.name,
        str(outcome.tiles[0]),
        grids,
        "other" if outcome.pixels is None else str(outcome.pixels),
        f"{outcome.prompt[0]} " + ("equal" if outcome.prompt_differs is None else "differ"),
        "" if logits is None else f"{logits.largest:.2g}",
        "" if logits is None else f"{logits.relative:.2g}",
        greedy,
    )
