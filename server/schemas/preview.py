"""What a preview answers, what the pictures and videos of a request would cost; and what a
rendering answers, where they are in its prompt."""

import msgspec


class PartPreview(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A picture or video as it would be shown. ``param`` names it as an error would; ``width`` and
    ``height`` are as shown, after ``orientation`` (EXIF, 1 to 8) or ``rotation`` (degrees,
    clockwise). ``tiles`` include thumbnails, ``tokens`` are those of the tiles. ``grid`` is a
    picture's columns, then rows; a video has ``frames`` of ``source_frames``. One that is
    ``reduced`` gets less than it asks for."""

    param: str
    type: str
    format: str
    width: int
    height: int
    tiles: int
    tokens: int
    reduced: bool
    orientation: int | None = None
    grid: tuple[int, int] | None = None
    frames: int | None = None
    source_frames: int | None = None
    duration: float | None = None
    fps: float | None = None
    rotation: int | None = None


class Setting(msgspec.Struct, omit_defaults=True):
    """A ``visual_budget``, what the prompt has with it, and whether that fits."""

    visual_budget: dict[str, int]
    prompt_tokens: int
    fits: bool


class Preview(msgspec.Struct):
    """Of a request. ``text_tokens`` is everything but tiles. ``fits`` counts the tokens that the
    request asks for as its answer, one if it does not say. ``cheapest`` is the least that all parts
    can be shown with; ``largest`` the most that fits, null where the request fits as it is, or
    where nothing does."""

    model: str
    fits: bool
    prompt_tokens: int
    text_tokens: int
    visual_tokens: int
    max_model_len: int
    parts: list[PartPreview]
    cheapest: Setting | None
    largest: Setting | None
    object: str = "internvl.preview"


class PartRender(PartPreview, omit_defaults=True, kw_only=True):
    """A picture or video in a prompt: offset and length in tokens of what stands for its pixels,
    one pair for a picture and for each frame of a video."""

    spans: list[tuple[int, int]]


class Render(msgspec.Struct):
    """A prompt as the engine would get it; ``parts`` stand in its order."""

    model: str
    prompt: str
    token_ids: list[int]
    prompt_tokens: int
    max_model_len: int
    parts: list[PartRender]
    object: str = "internvl.render"
