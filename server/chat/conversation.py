"""Messages taken apart: the turns of a conversation, and its pictures and videos as the media room
wants them asked for. Raises InvalidRequest for what a role cannot hold or a part cannot ask."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from preprocessing import FrameChoice, MediaPart
from preprocessing.allowance import Allowance
from preprocessing.media import Source, Treatment
from server.chat.prompt import Turn, Video
from server.files import PREFIX, Finder, Upload, no_file
from server.schemas.chat import (
    PART_TYPES,
    Bounds,
    FilePart,
    ImagePart,
    ImageUrl,
    Message,
    TextPart,
    VideoPart,
    VideoUrl,
)
from server.schemas.validate import decode
from wire.errors import Code, InvalidRequest
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings

# How vLLM's clients send frames: one URL, the pictures' base64 separated by commas.
_JPEG_FRAMES = "data:video/jpeg;base64,"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The turns of a request, and its pictures and videos in the order in which they are shown."""

    turns: list[Turn]
    pictures: list[MediaPart]
    videos: list[MediaPart]

    @property
    def parts(self) -> list[MediaPart]:
        """All pictures, then all videos."""
        return [*self.pictures, *self.videos]


@dataclasses.dataclass(frozen=True)
class Viewing:
    """What holds for every part of a request that says nothing else. Parts of another ``salt`` are
    other pictures to every cache. ``find`` knows the files that the request may name."""

    settings: MediaSettings
    geometry: VisionGeometry
    treatment: Treatment
    salt: bytes
    allowance: Allowance
    find: Finder

    def upload(self, name: str, param: str) -> Upload:
        """The file of this id. Raises NotFound."""
        found = self.find(name)
        if found is None:
            raise no_file(param)
        return found

    def source(self, url: str, param: str) -> Source:
        """What a URL names, if it is the id of a file. Raises NotFound."""
        return self.upload(url, param).file if url.startswith(PREFIX) else url

    def sources(self, url: str | tuple[str, ...], param: str) -> Source | tuple[Source, ...]:
        """Likewise, of one or of several."""
        if isinstance(url, str):
            return self.source(url, param)
        return tuple(self.source(one, f"{param}[{at}]") for at, one in enumerate(url))


def read_conversation(messages: Sequence[Message], viewing: Viewing) -> Conversation:
    """Take messages apart. Raises InvalidRequest, and NotFound for a file that is not there."""
    turns: list[Turn] = []
    pictures: list[MediaPart] = []
    videos: list[MediaPart] = []
    for index, message in enumerate(messages):
        content: list[str | int | Video] = []
        for number, part in enumerate(message.content or ()):
            where = f"messages[{index}].content[{number}]"
            allowed = PART_TYPES[message.role]
            if part.type not in allowed:
                raise InvalidRequest(
                    f"{where}.type: messages of the role '{message.role}' can hold "
                    f"{' and '.join(map(repr, allowed))} only.",
                    param=f"{where}.type",
                )
            if isinstance(part, ImagePart | VideoPart | FilePart):
                shown = _part(part, where, viewing)
                if shown.kind == "image":
                    content.append(len(pictures))
                    pictures.append(shown)
                elif "video_url" in allowed:
                    content.append(Video(len(videos)))
                    videos.append(shown)
                else:
                    raise InvalidRequest(
                        f"{shown.param}: messages of the role '{message.role}' can show no video.",
                        param=shown.param,
                    )
            else:
                text = part.text if isinstance(part, TextPart) else part.refusal
                if text:
                    content.append(text)
        if message.content is None and not message.tool_calls:
            raise InvalidRequest(
                f"messages[{index}].content is missing.",
                param=f"messages[{index}].content",
                code="missing_required_parameter",
            )
        role = "system" if message.role == "developer" else message.role
        turns.append(Turn(role, tuple(content), _calls(message, index)))
    _check_number("pictures", len(pictures), viewing.settings.max_images, "too_many_images")
    _check_number("videos", len(videos), viewing.settings.max_videos, "too_many_videos")
    return Conversation(turns, pictures, videos)


def _check_number(what: str, found: int, most: int, code: Code) -> None:
    if found > most:
        raise InvalidRequest(
            f"The request has {found} {what}; at most {most} are allowed.",
            param="messages",
            code=code,
        )


def _part(part: ImagePart | VideoPart | FilePart, where: str, viewing: Viewing) -> MediaPart:
    if isinstance(part, ImagePart):
        where = f"{where}.image_url"
        return _picture(part.image_url, where, f"{where}.url", viewing)
    if isinstance(part, VideoPart):
        where = f"{where}.video_url"
        return _video(part.video_url, where, f"{where}.url", viewing)
    asked, where = part.file, f"{where}.file"
    param = f"{where}.file_id"
    bounds = {name: getattr(asked, name) for name in Bounds.model_fields}
    if viewing.upload(asked.file_id, param).kind == "image":
        picture = ImageUrl(url=asked.file_id, detail=asked.detail, **bounds)
        return _picture(picture, where, param, viewing)
    return _video(VideoUrl(url=asked.file_id, **bounds), where, param, viewing)


def _picture(asked: ImageUrl, where: str, param: str, viewing: Viewing) -> MediaPart:
    most = asked.max_tiles
    if most is None and asked.detail == "low":
        most = 1
    return MediaPart(
        url=viewing.source(asked.url, param),
        param=param,
        max_tiles=_tiles(most, f"{where}.max_tiles", viewing.geometry.tile_limit),
        min_tiles=_least(asked.min_tiles, most, viewing.geometry.max_tiles, where),
        treatment=asked.preprocess or viewing.treatment,
        fit=bool(asked.fit),
        salt=viewing.salt,
        allowance=viewing.allowance,
    )


def _video(asked: VideoUrl, where: str, param: str, viewing: Viewing) -> MediaPart:
    settings = viewing.settings
    url: str | tuple[str, ...] = asked.url or tuple(asked.frames or ())
    if not asked.url:
        param = f"{where}.frames"
    if isinstance(url, str) and url[: len(_JPEG_FRAMES)].lower() == _JPEG_FRAMES:
        # Counted before they are taken apart: a comma costs an attacker nothing.
        _frames(url.count(",", len(_JPEG_FRAMES)) + 1, param, settings)
        pictures = url[len(_JPEG_FRAMES) :].split(",")
        url = tuple(f"data:image/jpeg;base64,{picture}" for picture in pictures)
    if isinstance(url, tuple):
        _frames(len(url), param, settings)
    most = asked.num_frames
    if most is None:
        most = min(settings.num_video_frames, settings.max_video_frames)
        if isinstance(url, tuple):
            most = len(url)
        elif asked.fps is not None:  # says how many, up to what the server allows
            most = settings.max_video_frames
    _frames(most, f"{where}.num_frames", settings)
    return MediaPart(
        url=viewing.sources(url, param),
        param=param,
        kind="video",
        choice=FrameChoice(most, asked.fps, asked.start, asked.end),
        max_tiles=_tiles(asked.max_tiles, f"{where}.max_tiles", viewing.geometry.tile_limit),
        min_tiles=_least(asked.min_tiles, asked.max_tiles, 1, where),
        treatment=asked.preprocess or viewing.treatment,
        fit=asked.fit is not False,
        salt=viewing.salt,
        allowance=viewing.allowance,
    )


def _frames(found: int, param: str, settings: MediaSettings) -> None:
    if found > settings.max_video_frames:
        raise InvalidRequest(
            f"{param}: at most {settings.max_video_frames} frames of a video can be shown.",
            param=param,
            code="too_many_frames",
        )


def _tiles(asked: int | None, param: str, most: int) -> int | None:
    if asked is not None and asked > most:
        raise InvalidRequest(f"{param} must be at most {most}.", param=param)
    return asked


def _least(asked: int | None, most: int | None, default: int, where: str) -> int | None:
    """``min_tiles``, which cannot be more than the most there can be."""
    limit = default if most is None else most
    return _tiles(asked, f"{where}.min_tiles", limit)


def _calls(message: Message, index: int) -> tuple[tuple[str, dict[str, Any]], ...]:
    if message.tool_calls and message.role != "assistant":
        where = f"messages[{index}].tool_calls"
        raise InvalidRequest(f"{where}: only assistant messages call tools.", param=where)
    calls = []
    for number, call in enumerate(message.tool_calls or ()):
        try:
            arguments = decode(call.function.arguments or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            where = f"messages[{index}].tool_calls[{number}].function.arguments"
            raise InvalidRequest(f"{where} must be the text of a JSON object.", param=where)
        calls.append((call.function.name, arguments))
    return tuple(calls)
