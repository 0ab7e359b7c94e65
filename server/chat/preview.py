"""What a chat request would cost, without decoding a pixel: its pictures and videos are fetched and
their headers read. It counts with the functions that the request itself would be counted with."""

import dataclasses
from collections.abc import Sequence
from contextlib import suppress

from preprocessing import MediaPart
from preprocessing.grid import choose_grid
from preprocessing.media import Facts, PictureFacts, TileSettings, VideoFacts
from server.auth import Tenant
from server.chat.prepare import Run, ServedModel, check_model, read_prompt
from server.chat.showing import Canvas, Media, open_all
from server.chat.visual import Fitter, View
from server.files import FileStore
from server.schemas.chat import ChatRequest
from server.schemas.preview import PartPreview, Preview, Setting
from wire.errors import ContextTooLong
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings


@dataclasses.dataclass(frozen=True)
class Sketch:
    """A chat request as far as its headers tell it: what each of its parts, all pictures and then
    all videos, is, and what they stand in."""

    model: ServedModel
    canvas: Canvas
    parts: Sequence[MediaPart]
    facts: Sequence[Sequence[Facts]]

    def fitter(self) -> Fitter:
        """What settles how the parts are shown."""
        return Fitter(self.parts, self.facts, self.canvas.limits(self.parts))

    def part(self, at: int, view: View) -> PartPreview:
        """What is told of a part that is shown so."""
        return _part(view, self.parts[at], self.facts[at], self.model.ready.geometry)

    def fits(self, prompt: int) -> bool:
        """Whether so many tokens leave room for the answer that is asked for."""
        return prompt + (self.canvas.answer_tokens or 1) <= self.canvas.context


async def sketch(
    request: ChatRequest,
    model: ServedModel,
    media: Media,
    limits: MediaSettings,
    run: Run,
    tenant: Tenant,
    files: FileStore,
) -> Sketch:
    """Raises what the request itself would be refused with because of its messages, except for what
    does not fit."""
    check_model(request.model, model)
    conversation, canvas = await read_prompt(request, model, limits, run, tenant, files)
    parts = conversation.parts
    async with media.hold(parts) as held:
        # The files themselves are not kept: their room is given back here.
        opened = await open_all(media, parts, held, limits.decode_workers + 2)
        facts = [one.facts for one in opened]
        del opened
    return Sketch(model, canvas, parts, facts)


def preview(sketch: Sketch) -> Preview:
    """What it would cost. Slow: call it in a thread. Raises InvalidRequest for a budget that is too
    small."""
    model, canvas = sketch.model, sketch.canvas
    geometry, context = model.ready.geometry, canvas.context
    fitter = sketch.fitter()
    views = fitter.asked()
    with suppress(ContextTooLong):
        views = fitter.fitted()

    def setting(views: Sequence[View] | None) -> Setting | None:
        if not views:
            return None
        prompt = canvas.length(views)
        tiles = sum(view.tiles for view in views)
        return Setting({"max_tiles": tiles}, prompt, sketch.fits(prompt))

    prompt = canvas.length(views)
    visual = sum(view.tiles for view in views) * geometry.tokens_per_tile
    fits = sketch.fits(prompt)
    return Preview(
        model=model.name,
        fits=fits,
        prompt_tokens=prompt,
        text_tokens=prompt - visual,
        visual_tokens=visual,
        max_model_len=context,
        parts=[sketch.part(at, views[at]) for at in canvas.order],
        cheapest=setting(fitter.smallest()),
        largest=None if fits else setting(fitter.largest_that_fits()),
    )


def _part(
    view: View, asked: MediaPart, facts: Sequence[Facts], geometry: VisionGeometry
) -> PartPreview:
    first = facts[0]
    found = PartPreview(
        param=asked.param,
        type=asked.kind,
        format=first.format if isinstance(first, PictureFacts) else first.container,
        width=first.width,
        height=first.height,
        tiles=view.tiles,
        tokens=view.tiles * geometry.tokens_per_tile,
        reduced=view.part != asked,
    )
    if asked.kind == "video":
        found.frames, found.source_frames = len(view.shots), len(facts)
    elif isinstance(first, PictureFacts):
        settings = TileSettings.for_part(geometry, view.part)
        found.orientation = first.orientation
        found.grid = choose_grid(
            first.width, first.height, settings.side, settings.min_tiles, settings.max_tiles
        )
    if isinstance(first, VideoFacts):
        found.source_frames, found.rotation = first.frames, first.rotation
        found.duration, found.fps = round(first.duration, 3), round(first.fps, 3)
    return found
