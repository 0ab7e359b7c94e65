"""Videos of every container, codec and oddity, through a real worker in its sandbox: the frames
that come back are the right ones, upright, in the right colours."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from preprocessing.frames import segment_middles
from preprocessing.media import FrameChoice, Frames
from tests import clips
from tests.sandboxed import Worker, worker

COUNT, SIZE = 30, (64, 64)

X264 = ("-c:v", "libx264", "-preset", "veryfast", "-qp", "12", "-pix_fmt", "yuv420p")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p", "-x265-params")
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-crf", "10", "-b:v", "0")
VP8 = ("-c:v", "libvpx", "-deadline", "realtime", "-b:v", "900k", "-qmax", "10")
AV1 = ("-c:v", "libaom-av1", "-cpu-used", "8", "-usage", "realtime", "-crf", "10")
SINE = ("-f", "lavfi", "-t", "1.2", "-i", "sine")


def x264(*params: str) -> tuple[str, ...]:
    return (*X264, "-x264-params", ":".join(params))


# Name of the file -> options of the encoder; what follows is what else ``clips.encode`` is told.
VARIANTS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "plain.mp4": (x264("bframes=0"), {}),
    "b-frames.mp4": (x264("bframes=3:keyint=10:b-pyramid=normal"), {}),
    "open gop.mp4": (x264("bframes=3:keyint=8:open-gop=1:scenecut=0"), {}),
    "open gop.mkv": (x264("bframes=3:keyint=8:open-gop=1:scenecut=0"), {}),
    "long gop.mp4": (x264("bframes=3:keyint=300"), {"count": 200}),
    "key frames only.mp4": (x264("keyint=1"), {}),
    "intra refresh.mkv": (x264("intra-refresh=1:keyint=10:bframes=0"), {}),
    "hidden b.mp4": (x264("bframes=3:keyint=12"), {"count": 100, "rate": "30000/1001"}),
    "faststart.mp4": ((*X264, "-movflags", "+faststart"), {}),
    "fragments.mp4": ((*X264, "-g", "10", "-movflags", "frag_keyframe+empty_moov"), {}),
    "dash.mp4": ((*X264, "-g", "10", "-movflags", "+dash+frag_keyframe"), {}),
    "one frame.mp4": (X264, {"count": 1}),
    "two frames.mp4": (X264, {"count": 2}),
    "interlaced.mp4": ((*X264, "-flags", "+ildct+ilme", "-x264-params", "tff=1"), {}),
    "4:2:2.mp4": ((*X264, "-pix_fmt", "yuv422p"), {}),
    "4:4:4.mp4": ((*X264, "-pix_fmt", "yuv444p"), {}),
    "ten bits.mp4": ((*X264, "-pix_fmt", "yuv420p10le"), {}),
    "full range.mp4": (
        (*X264, "-vf", "scale=out_range=pc", "-color_range", "pc"), {}),
    "bt709.mp4": ((*X264, "-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709"), {}),
    "bt2020.mkv": ((*X264, "-vf", "scale=out_color_matrix=bt2020", "-colorspace", "bt2020nc"), {}),
    "rgb.mkv": (("-c:v", "libx264rgb", "-qp", "10"), {}),
    "odd size.mp4": ((*X264, "-pix_fmt", "yuv444p"), {"size": (65, 63)}),
    "strip.mp4": (X264, {"size": (32, 1024)}),
    "banner.mkv": (X264, {"size": (2000, 16)}),
    "with sound.mp4": ((*X264, "-c:a", "aac", "-shortest"), {"inputs": SINE}),
    "sound first.mkv": (
        (*X264, "-map", "0:a", "-map", "1:v", "-c:a", "libopus"), {"inputs": SINE}),
    "camera.mov": ((*X264, "-c:a", "pcm_s16le", "-shortest"), {"inputs": SINE}),
    "b-frames.avi": (x264("bframes=3:keyint=10"), {}),
    "b-frames.flv": (x264("bframes=3:keyint=10"), {}),
    "b-frames.ts": (x264("bframes=3:keyint=10"), {}),
    "late.ts": ((*X264, "-output_ts_offset", "95000"), {}),
    "bluray.m2ts": ((*X264, "-mpegts_m2ts_mode", "1"), {}),
    "negative.mkv": ((*X264, "-avoid_negative_ts", "disabled", "-output_ts_offset", "-0.2"), {}),
    "live.webm": ((*VP9, "-live", "1"), {}),
    "hevc.mp4": ((*X265, "log-level=none:open-gop=1:keyint=8:bframes=3"), {}),
    "hevc.ts": ((*X265, "log-level=none:open-gop=1:keyint=8:bframes=3"), {}),
    "hevc ten bits.mkv": (
        (*X265[:4], "-pix_fmt", "yuv420p10le", "-x265-params", "log-level=none"), {}),
    "vvc.mp4": (("-c:v", "libvvenc", "-preset", "faster", "-qp", "20"), {"count": 8}),
    "vp8.webm": ((*VP8, "-auto-alt-ref", "1", "-lag-in-frames", "16"), {}),
    "vp9.webm": (
        ("-c:v", "libvpx-vp9", "-deadline", "good", "-cpu-used", "5", "-crf", "10", "-b:v", "0",
         "-auto-alt-ref", "1", "-lag-in-frames", "16", "-g", "12"), {}),
    "vp9 4:4:4.webm": ((*VP9, "-pix_fmt", "yuv444p"), {}),
    "vp9 ten bits.mkv": ((*VP9, "-pix_fmt", "yuv420p10le"), {}),
    "av1.mp4": (AV1, {}),
    "av1.webm": ((*AV1, "-g", "10"), {}),
    "mpeg4.mp4": (("-c:v", "mpeg4", "-q:v", "2", "-bf", "2"), {}),
    "mpeg4.avi": (("-c:v", "mpeg4", "-q:v", "2", "-bf", "2"), {}),
    "xvid.avi": (("-c:v", "mpeg4", "-vtag", "xvid", "-q:v", "2"), {}),
    "divx3.avi": (("-c:v", "msmpeg4", "-q:v", "2"), {}),
    "phone.3gp": (("-c:v", "h263", "-q:v", "2"), {"size": (128, 96)}),
    "mpeg2.mpg": (("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2"), {}),
    "mpeg2.ts": (("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2", "-g", "9"), {}),
    "mpeg1.mpg": (("-c:v", "mpeg1video", "-q:v", "2", "-bf", "2"), {}),
    "mjpeg.avi": (("-c:v", "mjpeg", "-q:v", "2"), {}),
    "mjpeg.mov": (("-c:v", "mjpeg", "-q:v", "2"), {}),
    "prores.mov": (("-c:v", "prores"), {}),
    "theora.ogv": (("-c:v", "libtheora", "-q:v", "10"), {}),
    "windows.wmv": (("-c:v", "wmv2", "-q:v", "2"), {}),
    "flash.flv": (("-c:v", "flv", "-q:v", "2"), {}),
    "moving.gif": ((), {}),
    "moving.apng": (("-f", "apng"), {}),
    "lossless.mkv": (("-c:v", "ffv1"), {}),
    "huff.avi": (("-c:v", "ffvhuff"), {}),
    "raw.avi": (("-c:v", "rawvideo", "-pix_fmt", "bgr24"), {}),
    "animation.mov": (("-c:v", "qtrle"), {}),
    "png.mov": (("-c:v", "png"), {}),
    "edit.mov": (("-c:v", "dnxhd", "-profile:v", "dnxhr_sq", "-pix_fmt", "yuv422p"),
                 {"size": (256, 128)}),
    "camcorder.avi": (("-c:v", "dvvideo", "-pix_fmt", "yuv420p"),
                      {"size": (720, 576), "count": 6}),
}  # fmt: skip


# Formats whose pixels are not square by definition.
STRETCHED = {"phone.3gp": (140, 96), "camcorder.avi": (768, 576)}


@pytest.fixture(scope="module")
def strict() -> Iterator[Worker]:
    with worker() as started:
        yield started
        assert started.process.poll() is None


def seen(
    worker: Worker, encoded: bytes, choice: FrameChoice, **changes: Any
) -> tuple[Frames, list[int]]:
    """The answer, and the numbers that stand in the frames; all are upright."""
    answer, pictures = worker.frames(encoded, choice, **changes)
    assert isinstance(answer, Frames), answer
    assert all(map(clips.is_upright, pictures))
    return answer, list(map(clips.number, pictures))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_shows_the_frames_it_is_asked_for(
    name: str, strict: Worker, tmp_path: Path
) -> None:
    options, told = VARIANTS[name]
    encoded = clips.encode(tmp_path / name, options, **told)
    count = told.get("count", COUNT)
    whole, numbers = seen(strict, encoded, FrameChoice(count))
    assert whole.indices == numbers == list(range(count))
    assert (whole.facts.width, whole.facts.height) == STRETCHED.get(name, told.get("size", SIZE))
    upper, _, lower = told.get("rate", "25").partition("/")
    period = int(lower or 1) / int(upper)
    assert whole.seconds == pytest.approx([at * period for at in range(count)], abs=0.0011)
    assert whole.facts.frames == count
    if count > 1:
        assert whole.facts.fps == pytest.approx(1 / period, rel=0.01)
        assert whole.facts.duration == pytest.approx(count * period, rel=0.01)
    for some in (1, 3, 7):
        fewer, numbers = seen(strict, encoded, FrameChoice(some))
        assert fewer.indices == numbers == segment_middles(0, count - 1, some)
    assert strict.look(encoded) == whole.facts
