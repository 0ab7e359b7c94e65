"""Videos of every container, codec and oddity, through a real worker in its sandbox: the frames
that come back are the right ones, upright, in the right colours."""

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image, ImageChops, ImageStat

from preprocessing.frames import segment_middles
from preprocessing.media import FrameChoice, Frames, FramesJob, Refused, TileSettings
from preprocessing.videos import read_frames
from tests import clips
from tests.sandboxed import SIDE, Worker, worker

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


# how it is shown


def turned(transpose: Image.Transpose | None, count: int = 6) -> list[Image.Image]:
    """Frames that lie on their side, or stand on their head."""
    shown = [clips.frame(at, 96, 64) for at in range(count)]
    return [one if transpose is None else one.transpose(transpose) for one in shown]


# ffmpeg counts degrees against the clock, as Pillow does. Matroska has no mirrored videos.
ROTATIONS = [
    (container, ("-display_rotation", angle), lying, rotation)
    for container in ("mp4", "mkv")
    for angle, lying, rotation in (
        ("90", Image.Transpose.ROTATE_270, 270),
        ("180", Image.Transpose.ROTATE_180, 180),
        ("270", Image.Transpose.ROTATE_90, 90),
        ("-20", None, 0),
        ("70", Image.Transpose.ROTATE_270, 270),
    )
] + [
    ("mp4", ("-display_hflip",), Image.Transpose.FLIP_LEFT_RIGHT, 0),
    ("mp4", ("-display_vflip",), Image.Transpose.FLIP_TOP_BOTTOM, 0),
]


@pytest.mark.parametrize(("container", "metadata", "lying", "rotation"), ROTATIONS)
def test_a_video_is_turned_upright(
    container: str,
    metadata: tuple[str, ...],
    lying: Image.Transpose | None,
    rotation: int,
    strict: Worker,
    tmp_path: Path,
) -> None:
    plain = tmp_path / f"plain.{container}"
    clips.encode(plain, X264, pictures=turned(lying))
    clips.ffmpeg(*metadata, "-i", plain, "-c", "copy", tmp_path / f"turned.{container}")
    encoded = (tmp_path / f"turned.{container}").read_bytes()
    for treatment in ("normalized", "reference"):
        settings = TileSettings(SIDE, 1, 1, True, treatment)
        answer, numbers = seen(strict, encoded, FrameChoice(6), settings=settings)
        assert numbers == list(range(6))
        assert (answer.facts.width, answer.facts.height) == (96, 64)
        assert answer.facts.rotation == rotation


@pytest.mark.parametrize(
    ("ratio", "size"),
    [("2/1", (128, 64)), ("1/2", (32, 64)), ("16/11", (93, 64)), ("1000/1", (64, 64))],
)
def test_pixels_that_are_not_square_are_stretched(
    ratio: str, size: tuple[int, int], strict: Worker, tmp_path: Path
) -> None:
    encoded = clips.encode(tmp_path / "clip.mp4", (*X264, "-vf", f"setsar={ratio}"), 3)
    answer, numbers = seen(strict, encoded, FrameChoice(3))
    assert numbers == [0, 1, 2]
    assert (answer.facts.width, answer.facts.height) == size
    assert [(one.width, one.height) for one in answer.tiles] == [size] * 3
    settings = TileSettings(SIDE, 1, 1, True, "reference")
    answer, _ = seen(strict, encoded, FrameChoice(3), settings=settings)
    assert (answer.facts.width, answer.facts.height) == (64, 64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clear.webm", (*VP9, "-pix_fmt", "yuva420p", "-auto-alt-ref", "0")),
        ("clear vp8.webm", (*VP8, "-pix_fmt", "yuva420p", "-auto-alt-ref", "0")),
        ("clear.mov", ("-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le")),
        ("animation.mov", ("-c:v", "qtrle", "-pix_fmt", "argb")),
        ("png.mov", ("-c:v", "png", "-pix_fmt", "rgba")),
        ("moving.apng", ("-f", "apng", "-pix_fmt", "rgba")),
        ("moving.gif", ("-filter_complex", "split[a][b];[a]palettegen[p];[b][p]paletteuse")),
        ("lossless.mkv", ("-c:v", "ffv1", "-pix_fmt", "bgra")),
    ],
)
def test_transparency_is_laid_on_white(
    name: str, options: Sequence[str], strict: Worker, tmp_path: Path
) -> None:
    pictures = []
    for at in range(6):
        picture = clips.frame(at).convert("RGBA")
        picture.paste((0, 0, 0, 0), (48, 48, 64, 64))
        pictures.append(picture)
    encoded = clips.encode(tmp_path / name, options, pictures=pictures)
    answer, shown = strict.frames(encoded, FrameChoice(6))
    assert isinstance(answer, Frames)
    for at, picture in enumerate(shown):
        assert (clips.number(picture), clips.is_upright(picture)) == (at, True)
        assert min(picture.getpixel((120, 120))) > 240  # type: ignore[arg-type, type-var]


def test_times_are_those_of_the_frames_where_the_rate_varies(
    strict: Worker, tmp_path: Path
) -> None:
    times = [0.04 * at + 0.02 * at * at for at in range(20)]
    timed = ("-vf", "setpts=(0.04*N+0.02*N*N)/TB", "-fps_mode", "passthrough")
    for name in ("clip.mp4", "clip.mkv", "clip.webm"):
        codec = VP9 if name.endswith("webm") else x264("bframes=2:keyint=7")
        encoded = clips.encode(tmp_path / name, (*codec, *timed), 20)
        answer, numbers = seen(strict, encoded, FrameChoice(20))
        assert numbers == list(range(20))
        assert answer.seconds == pytest.approx(times, abs=0.041)
        begin, end = answer.seconds[11], answer.seconds[14]
        part, numbers = seen(strict, encoded, FrameChoice(9, start=begin, end=end))
        assert part.indices == numbers == [11, 12, 13, 14]


def test_what_was_cut_off_is_not_shown(strict: Worker, tmp_path: Path) -> None:
    """Cutting without encoding again leaves frames in the file that only others refer to."""
    whole = tmp_path / "whole.mp4"
    clips.encode(whole, x264("bframes=2:keyint=20"), 50)
    clips.ffmpeg("-ss", "0.6", "-i", whole, "-c", "copy", tmp_path / "cut.mp4")
    answer, numbers = seen(strict, (tmp_path / "cut.mp4").read_bytes(), FrameChoice(50))
    assert numbers == list(range(15, 50))
    assert answer.indices == list(range(35))
    assert answer.seconds[0] == 0


def test_a_recording_that_begins_in_the_middle_begins_at_its_first_key_frame(
    strict: Worker, tmp_path: Path
) -> None:
    encoded = clips.encode(tmp_path / "clip.ts", x264("bframes=0:keyint=10:scenecut=0"), 30)
    first = encoded.index(b"\x47\x41\x00", 188 * 10)  # a packet that begins a frame
    rest = encoded[: 188 * 3] + encoded[first:]
    _, numbers = seen(strict, rest, FrameChoice(30))
    assert numbers == list(range(numbers[0], 30))
    assert 0 < numbers[0] <= 20


@pytest.mark.parametrize(
    "options",
    [
        x264("bframes=3:keyint=10:open-gop=1:ref=6:b-pyramid=normal:scenecut=0"),
        (*X265, "log-level=none:keyint=10:open-gop=1:bframes=3:ref=4"),
        ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2", "-g", "9"),
    ],
)
def test_frames_that_need_what_was_cut_off_show_the_first_that_is_whole(
    options: Sequence[str], strict: Worker, tmp_path: Path
) -> None:
    whole = clips.encode(tmp_path / "clip.ts", options, 40)
    shown_first = set()
    for part in range(1, 6):
        at = len(whole) // 188 * part // 8 * 188
        _, numbers = seen(strict, whole[: 188 * 3] + whole[at:], FrameChoice(40))
        first = numbers[0]
        extra = numbers.count(first) - 1
        assert numbers == [first] * extra + list(range(first, 40))
        assert extra <= 4
        shown_first.add(first)
    assert len(shown_first) > 2


@pytest.mark.parametrize("name", ["b-frames.mp4", "open gop.mkv", "hevc.mp4", "vp9.webm",
                                  "av1.webm", "mpeg4.avi", "mpeg2.ts"])  # fmt: skip
def test_frames_far_apart_are_what_decoding_everything_gives(name: str, tmp_path: Path) -> None:
    options, _ = VARIANTS[name]
    file = tmp_path / name
    clips.ffmpeg("-f", "lavfi", "-i", "testsrc2=size=128x96:rate=25:duration=3", *options, file)
    raw = clips.ffmpeg("-i", file, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    job = FramesJob(
        settings=TileSettings(SIDE, 1, 1, True, "reference"),
        choice=FrameChoice(7), max_pixels=1 << 24, max_frames=100, reader="auto", seconds=20,
    )  # fmt: skip
    _, indices, _, pictures = read_frames(file.read_bytes(), job)
    length = 3 * 128 * 96
    assert len(raw) == 75 * length
    for at, picture in zip(indices, pictures, strict=True):
        assert picture.tobytes() == raw[at * length : (at + 1) * length], at


def test_pictures_that_vp8_only_refers_to_are_no_frames(strict: Worker, tmp_path: Path) -> None:
    raw, file = tmp_path / "raw.mkv", tmp_path / "clip.webm"
    clips.encode(raw, ("-c:v", "ffv1"), 40)
    options = ("-c:v", "libvpx", "-deadline", "good", "-b:v", "900k", "-auto-alt-ref", "1",
               "-lag-in-frames", "16", "-passlogfile", str(tmp_path / "log"))  # fmt: skip
    clips.ffmpeg("-i", raw, *options, "-pass", "1", "-f", "null", "-")
    clips.ffmpeg("-i", raw, *options, "-pass", "2", file)
    with av.open(str(file)) as video:
        assert sum(packet.size > 0 for packet in video.demux(video=0)) > 40
    answer, numbers = seen(strict, file.read_bytes(), FrameChoice(99))
    assert numbers == answer.indices == list(range(40))


def test_a_packet_without_a_picture_shows_the_one_before(strict: Worker, tmp_path: Path) -> None:
    clips.encode(tmp_path / "clip.mkv", ("-c:v", "mpeg4", "-q:v", "2"), 5, rate="10")
    sink = io.BytesIO()
    with (
        av.open(str(tmp_path / "clip.mkv")) as video,
        av.open(sink, "w", format="matroska") as target,
    ):
        stream = target.add_stream_from_template(video.streams.video[0])
        for packet in video.demux(video=0):
            if packet.pts is None:
                continue
            packet.stream = stream
            pts = packet.pts
            target.mux(packet)
            if pts == 200:
                nothing = av.Packet(b"\0\0\1\xb6\x55\x9f")  # MPEG-4: a frame that is not coded
                nothing.pts = nothing.dts = 250
                nothing.time_base = Fraction(1, 1000)
                nothing.stream = stream
                target.mux(nothing)
    answer, numbers = seen(strict, sink.getvalue(), FrameChoice(9))
    assert numbers == [0, 1, 2, 2, 3, 4]
    assert answer.seconds == pytest.approx([0, 0.1, 0.2, 0.25, 0.3, 0.4])


def test_frames_that_an_encoder_dropped_leave_a_gap(strict: Worker, tmp_path: Path) -> None:
    gap = ("-vf", "setpts=(N+2*gte(N\\,3))/25/TB", "-fps_mode", "passthrough")
    encoded = clips.encode(tmp_path / "clip.avi", ("-c:v", "mpeg4", "-q:v", "2", *gap), 6)
    answer, numbers = seen(strict, encoded, FrameChoice(9))
    assert numbers == answer.indices == [0, 1, 2, 3, 4, 5]
    assert answer.seconds == pytest.approx([0.0, 0.04, 0.08, 0.2, 0.24, 0.28])


def test_the_size_may_change_but_not_beyond_the_limit(strict: Worker, tmp_path: Path) -> None:
    small = clips.encode(tmp_path / "small.ts", x264("bframes=0"), 5)
    large = clips.encode(
        tmp_path / "large.ts", (*x264("bframes=0"), "-output_ts_offset", "1"), 5, (128, 96)
    )
    answer, numbers = seen(strict, small + large, FrameChoice(10))
    assert numbers == [0, 1, 2, 3, 4] * 2
    assert [one.width for one in answer.tiles] == [64] * 5 + [128] * 5
    refused, _ = strict.frames(small + large, FrameChoice(10), max_pixels=5000)
    assert isinstance(refused, Refused)


def test_the_default_stream_is_shown_and_no_cover(strict: Worker, tmp_path: Path) -> None:
    video, other, cover = tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "cover.png"
    clips.encode(video, X264, 5)
    clips.encode(other, X264, pictures=[clips.frame(at) for at in range(100, 105)])
    clips.frame(255).save(cover)
    both = tmp_path / "both.mp4"
    clips.ffmpeg(
        "-i", cover, "-i", other, "-i", video, "-map", "0", "-map", "1", "-map", "2", "-c", "copy",
        "-disposition:v:0", "attached_pic", "-disposition:v:1", "0",
        "-disposition:v:2", "default", both,
    )  # fmt: skip
    _, numbers = seen(strict, both.read_bytes(), FrameChoice(5))
    assert numbers == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("max_tiles", [1, 6])
def test_every_frame_is_tiled_as_a_picture(max_tiles: int, strict: Worker, tmp_path: Path) -> None:
    encoded = clips.encode(tmp_path / "clip.mp4", X264, 4, (192, 64))
    settings = TileSettings(SIDE, 1, max_tiles, True)
    answer, _ = strict.frames(encoded, FrameChoice(4), settings=settings)
    assert isinstance(answer, Frames)
    grid = (1, 1, 1) if max_tiles == 1 else (4, 3, 1)
    assert [(one.count, one.columns, one.rows) for one in answer.tiles] == [grid] * 4


@pytest.mark.parametrize(
    "name",
    ["plain.mp4", "4:2:2.mp4", "4:4:4.mp4", "ten bits.mp4", "full range.mp4", "bt709.mp4",
     "bt2020.mkv", "rgb.mkv", "odd size.mp4", "vp9 ten bits.mkv", "prores.mov", "mjpeg.mov",
     "raw.avi", "moving.gif"],
)  # fmt: skip
def test_colours_are_those_that_ffmpeg_shows(name: str, tmp_path: Path) -> None:
    options, told = VARIANTS[name]
    encoded = clips.encode(tmp_path / name, options, **{**told, "count": 3})
    raw = clips.ffmpeg("-i", tmp_path / name, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    job = FramesJob(
        settings=TileSettings(SIDE, 1, 1, True, "reference"),
        choice=FrameChoice(3), max_pixels=1 << 24, max_frames=100, reader="auto", seconds=20,
    )  # fmt: skip
    _, _, _, pictures = read_frames(encoded, job)
    size = told.get("size", SIZE)
    for at, picture in enumerate(pictures):
        length = 3 * size[0] * size[1]
        theirs = Image.frombytes("RGB", size, raw[at * length : (at + 1) * length])
        difference = ImageChops.difference(picture, theirs)
        if name == "ten bits.mp4":  # ffmpeg places the colours of H.264 half a pixel further left
            assert max(ImageStat.Stat(difference).mean) <= 1
        else:
            assert max(high for _, high in difference.getextrema()) <= 1
