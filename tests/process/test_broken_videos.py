"""Videos that are damaged, lie, or try to break out, through a real worker in its sandbox: each
gets its frames or a typed refusal, the worker lives on, and its memory stays bounded."""

import functools
import io
import random
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from PIL import ImageChops, ImageStat

from preprocessing.images import Unreadable
from preprocessing.media import FrameChoice, Frames, LookJob, Reason, Refused, VideoFacts
from preprocessing.videos import look_video
from tests import clips
from tests.boxes import box, rebuild
from tests.process.test_video import AV1, SINE, VP8, VP9, X264, X265, x264
from tests.sandboxed import Worker, worker

CHOICE = FrameChoice(8)
MOST_MEMORY = 700 << 20

SOURCES: dict[str, tuple[str, ...]] = {
    "clip.mp4": x264("bframes=2:keyint=5"),
    "fast.mp4": (*x264("bframes=2:keyint=5"), "-movflags", "+faststart"),
    "fragments.mp4": (*X264, "-g", "5", "-movflags", "frag_keyframe+empty_moov+default_base_moof"),
    "clip.mkv": x264("bframes=2:keyint=5"),
    "clip.ts": x264("bframes=2:keyint=5"),
    "clip.avi": ("-c:v", "mpeg4", "-q:v", "2", "-bf", "2"),
    "clip.flv": ("-c:v", "flv", "-q:v", "2"),
    "clip.mpg": ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2"),
    "clip.ogv": ("-c:v", "libtheora", "-q:v", "10"),
    "clip.wmv": ("-c:v", "wmv2", "-q:v", "2"),
    "clip.gif": (),
    "clip.apng": ("-f", "apng"),
    "hevc.mp4": (*X265, "log-level=none:keyint=5"),
    "vp8.webm": VP8,
    "vp9.webm": VP9,
    "av1.mkv": AV1,
    "mjpeg.mov": ("-c:v", "mjpeg", "-q:v", "2"),
    "prores.mov": ("-c:v", "prores"),
    "qtrle.mov": ("-c:v", "qtrle"),
    "ffv1.mkv": ("-c:v", "ffv1"),
}


@functools.cache
def source(name: str) -> bytes:
    """A sound video of twelve frames."""
    with tempfile.TemporaryDirectory() as folder:
        return clips.encode(Path(folder) / name, SOURCES[name], 12)


@pytest.fixture(scope="module")
def strict() -> Iterator[Worker]:
    with worker() as started:
        yield started
        assert started.process.poll() is None
        assert started.peak_bytes() < MOST_MEMORY


def answered(strict: Worker, encoded: bytes) -> Reason | None:
    """Why it was refused; None when there are frames, of which as many as were announced."""
    answer, pictures = strict.frames(encoded, CHOICE)
    if isinstance(answer, Refused):
        return answer.reason
    assert isinstance(answer, Frames)
    assert 1 <= len(pictures) == len(answer.indices) == len(answer.seconds) <= CHOICE.most
    return None


# files that end early


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_that_ends_anywhere_is_answered(name: str, strict: Worker) -> None:
    whole = source(name)
    assert answered(strict, whole) is None
    for part in range(12):
        assert answered(strict, whole[: len(whole) * part // 12]) in (None, *Reason)


@pytest.mark.parametrize("lost", [1, 10, 200])
def test_a_file_that_is_shorter_than_its_index_says_is_refused(lost: int, strict: Worker) -> None:
    assert answered(strict, source("fast.mp4")[:-lost]) is Reason.BROKEN


def test_what_has_no_index_is_shown_as_far_as_it_goes(strict: Worker) -> None:
    whole = source("clip.ts")
    answer, shown = strict.frames(whole[: 188 * (len(whole) // 188 // 2)], FrameChoice(12))
    assert isinstance(answer, Frames)
    assert [clips.number(one) for one in shown] == answer.indices
    assert 1 < len(shown) < 12


# what is no video


def sounds(name: str, *options: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        clips.ffmpeg(*SINE, *options, Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def with_cover(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        cover = Path(folder) / "cover.png"
        clips.frame(1).save(cover)
        clips.ffmpeg(
            *SINE, "-i", cover, "-map", "0", "-map", "1", "-c:v", "copy",
            "-disposition:v:0", "attached_pic", Path(folder) / name,
        )  # fmt: skip
        return (Path(folder) / name).read_bytes()


def subtitles() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.srt"
        text.write_text("1\n00:00:00,000 --> 00:00:02,000\nhello\n")
        clips.ffmpeg("-i", text, Path(folder) / "text.mkv")
        return (Path(folder) / "text.mkv").read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(sounds, "sound.m4a", "-c:a", "aac"),
        functools.partial(sounds, "sound.webm", "-c:a", "libopus"),
        functools.partial(sounds, "sound.ogg", "-c:a", "libopus"),
        functools.partial(sounds, "sound.avi", "-c:a", "pcm_s16le"),
        functools.partial(sounds, "sound.flv", "-c:a", "aac"),
        functools.partial(sounds, "sound.ts", "-c:a", "aac"),
        functools.partial(with_cover, "song.m4a"),
        subtitles,
    ],
)
def test_a_file_without_moving_pictures_has_no_video(
    make: Callable[[], bytes], strict: Worker
) -> None:
    encoded = make()
    assert answered(strict, encoded) is Reason.NO_VIDEO
    assert strict.look(encoded) == Refused(Reason.NO_VIDEO)


def picture(kind: str) -> bytes:
    sink = io.BytesIO()
    clips.frame(1).save(sink, kind)
    return sink.getvalue()


NO_VIDEOS: dict[str, bytes | Callable[[], bytes]] = {
    "nothing": b"",
    "one byte": b"\0",
    "zeros": bytes(5000),
    "text": b"hello world\n" * 100,
    "a page": b"<!doctype html><video src='file:///etc/passwd'></video>",
    "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n",
    "m3u8 of the web": b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:1/x.ts\n#EXT-X-ENDLIST\n",
    "m3u8 with a key": b'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="file:///etc/passwd"\nx.ts\n',
    "ffconcat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "concat": b"concat:/etc/passwd|/etc/passwd",
    "subfile": b"subfile,,start,0,end,9,,:/etc/passwd",
    "dash": b"<?xml version='1.0'?><MPD><BaseURL>http://127.0.0.1:1/</BaseURL></MPD>",
    "session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "rtsp": b"rtsptext\nrtsp://127.0.0.1:1/",
    "smil": b"<smil><video src='http://127.0.0.1:1/'/></smil>",
    "avisynth": b'AviSource("x.avi")\n',
    "subtitles": b"[Script Info]\nScriptType: v4.00+\n[Events]\n",
    "terminal": b"\x1b[2J\x1b[31mhello\x1b[0m" * 50,
    "xbin": b"XBIN\x1a\x08\x00\x02\x00\x10\x00" + bytes(200),
    "y4m": b"YUV4MPEG2 W4 H4 F25:1\nFRAME\n" + bytes(24),
    "raw h264": b"\0\0\0\1\x67" + bytes(50),
    "zip": b"PK\3\4" + bytes(100),
    "pdf": b"%PDF-1.7\n" + bytes(100),
    "program": b"\x7fELF" + bytes(100),
    "jpeg": lambda: picture("JPEG"),
    "webp": lambda: picture("WEBP"),
    "bmp": lambda: picture("BMP"),
    "tiff": lambda: picture("TIFF"),
    "wave": lambda: sounds("sound.wav"),
    "mp3 with a cover": lambda: with_cover("song.mp3"),
    "flac": lambda: sounds("sound.flac"),
    "jpeg, then mp4": lambda: picture("JPEG") + source("clip.mp4"),
    "mp4 in a comment of a jpeg": lambda: b"\xff\xd8\xff\xfe\x23\x28" + source("clip.mp4"),
    "mp4 after a space": lambda: b" " + source("clip.mp4"),
}


@pytest.mark.parametrize("name", NO_VIDEOS)
def test_what_is_no_video_container_is_not_tried(name: str, strict: Worker) -> None:
    made = NO_VIDEOS[name]
    encoded = made if isinstance(made, bytes) else made()
    assert answered(strict, encoded) is Reason.UNSUPPORTED
    assert strict.look(encoded) == Refused(Reason.UNSUPPORTED)


def test_a_still_png_has_no_frames_that_move(strict: Worker) -> None:
    assert answered(strict, picture("PNG")) in (Reason.BROKEN, Reason.NO_VIDEO, None)


# what lies


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_apng() -> bytes:
    whole = source("clip.apng")
    return (
        whole[:8]
        + png_chunk(b"IHDR", struct.pack(">II", 90_000, 90_000) + whole[24:29])
        + whole[33:]
    )


def huge_raw() -> bytes:
    """An AVI of uncompressed frames that are said to be 60 000 pixels wide and high."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("-c:v", "rawvideo", "-pix_fmt", "bgr24")
        whole = bytearray(clips.encode(Path(folder) / "raw.avi", options, 2))
    at = whole.index(b"strf") + 12
    struct.pack_into("<ii", whole, at, 60_000, 60_000)
    return bytes(whole)


def samples(count: int, size: int) -> bytes:
    """A moov that promises ``count`` samples of ``size`` bytes."""
    return rebuild(
        source("clip.mp4"),
        {
            b"stsz": lambda _: struct.pack(">III", 0, size, count),
            b"stts": lambda _: struct.pack(">IIII", 0, 1, count, 512),
            b"stsc": lambda _: struct.pack(">IIIII", 0, 1, 1, count, 1),
            b"ctts": lambda _: struct.pack(">IIII", 0, 1, count, 0),
        },
    )


def run_of_samples(count: int) -> bytes:
    """A fragment that promises ``count`` samples, and says nothing of any."""
    whole = bytearray(source("fragments.mp4"))
    struct.pack_into(">II", whole, whole.index(b"trun") + 4, 0, count)
    return bytes(whole)


def of_track(whole: bytes) -> bytes:
    """The box of the track."""
    at = whole.index(b"trak") - 4
    return whole[at : at + int.from_bytes(whole[at : at + 4], "big")]


def wide(whole: bytes) -> bytes:
    """With a size of 64 bits before the table of sizes."""
    at = whole.index(b"stsz") - 4
    size = int.from_bytes(whole[at : at + 4], "big")
    head = struct.pack(">I4sQ", 1, b"stsz", size + 8)
    grown = bytearray(whole[:at] + head + whole[at + 8 :])
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        at = whole.index(kind) - 4
        struct.pack_into(">I", grown, at, int.from_bytes(whole[at : at + 4], "big") + 8)
    return bytes(grown)


def packed(whole: bytes) -> bytes:
    """With a compressed moov."""
    at = whole.index(b"moov") - 4
    moov = whole[at : at + int.from_bytes(whole[at : at + 4], "big")]
    inner = struct.pack(">I", len(moov)) + zlib.compress(moov)
    cmov = box(b"cmov", box(b"dcom", b"zlib") + box(b"cmvd", inner))
    return whole[:at] + box(b"moov", cmov) + box(b"mdat", bytes(99))


def many_times(count: int) -> bytes:
    """A table of ``count`` entries about when frames are shown."""
    entry = struct.pack(">II", 0xFFFFFFFF, 0x7FFFFFFF)
    change = {b"stts": lambda _: struct.pack(">II", 0, count) + entry * count}
    return rebuild(source("clip.mp4"), change)


def long_edits(count: int) -> bytes:
    """An edit list that shows the whole video ``count`` times."""
    entry = struct.pack(">IiHH", 1000, 0, 1, 0)
    change = {b"elst": lambda _: struct.pack(">II", 0, count) + entry * count}
    return rebuild(source("clip.mp4"), change)


def slow(body: bytes) -> bytes:
    """Frames two years apart."""
    count, _ = struct.unpack(">II", body[8:16])
    return body[:8] + struct.pack(">II", count, 0x7FFFFFFF)


def changed(name: str, **change: Callable[[bytes], bytes]) -> bytes:
    return rebuild(source(name), {kind.encode(): how for kind, how in change.items()})


def until(name: str, mark: bytes) -> bytes:
    return source(name)[: source(name).index(mark)]


def large_gif() -> bytes:
    return source("clip.gif")[:6] + struct.pack("<HH", 20_000, 20_000) + source("clip.gif")[10:]


ALL_ONES = b"\xff" * 4
LIES: dict[str, tuple[Callable[[], bytes], set[Reason | None]]] = {
    "an apng of 8 gigapixels": (huge_apng, {Reason.BROKEN}),
    "an avi of 3 gigapixels": (huge_raw, {Reason.BROKEN}),
    "a gif of 400 megapixels": (large_gif, {Reason.BROKEN}),
    "no samples": (lambda: samples(0, 1), {Reason.NO_FRAMES}),
    "a million samples": (
        lambda: samples(1_000_000, 1), {Reason.TOO_MANY_FRAMES, Reason.BROKEN}),
    "two thousand million samples": (
        lambda: samples(0x7FFFFFFF, 1), {Reason.NO_FRAMES, Reason.TOO_LARGE, Reason.BROKEN}),
    "empty samples": (
        lambda: samples(0xFFFFFFFF, 0), {Reason.NO_FRAMES, Reason.TOO_LARGE, Reason.BROKEN}),
    "a million times": (lambda: many_times(1_000_000), {None, Reason.BROKEN}),
    "an edit list": (lambda: long_edits(3), {None}),
    "a bomb of edits": (
        lambda: long_edits(50_000),
        {Reason.TOO_MANY_FRAMES, Reason.TOO_LARGE, Reason.BROKEN}),
    "years between frames": (lambda: changed("clip.mp4", stts=slow), {None}),
    "a duration of years": (
        lambda: changed(
            "clip.mp4",
            mvhd=lambda body: body[:16] + ALL_ONES + body[20:],
            mdhd=lambda body: body[:16] + ALL_ONES + body[20:],
        ), {None}),
    "another size in the track": (
        lambda: changed("clip.mp4", tkhd=lambda body: body[:76] + ALL_ONES * 2), {None}),
    "no time scale": (
        lambda: changed("clip.mp4", mdhd=lambda body: body[:12] + bytes(4) + body[16:]),
        {None, Reason.NO_FRAMES}),
    "the finest time scale": (
        lambda: changed("clip.mp4", mdhd=lambda body: body[:12] + ALL_ONES + body[16:]),
        {None, Reason.NO_FRAMES}),
    "frames behind the end": (
        lambda: changed("clip.mp4", stco=lambda body: body[:8] + ALL_ONES), {Reason.BROKEN}),
    "another codec": (
        lambda: changed("clip.mp4", stsd=lambda body: body.replace(b"avc1", b"mjp2")),
        {Reason.UNSUPPORTED, Reason.BROKEN}),
    "an unknown codec": (
        lambda: changed("clip.mp4", stsd=lambda body: body.replace(b"avc1", b"zzzz")),
        {Reason.UNSUPPORTED, Reason.BROKEN}),
    "fragments without one": (
        lambda: until("fragments.mp4", b"moof")[:-4], {Reason.NO_FRAMES, Reason.BROKEN}),
    "no cluster": (
        lambda: until("clip.mkv", b"\x1f\x43\xb6\x75"), {Reason.NO_FRAMES, Reason.BROKEN}),
    "mp4, then jpeg": (lambda: source("clip.mp4") + picture("JPEG"), {None}),
    "mp4, then a playlist": (
        lambda: source("clip.mp4") + b"#EXTM3U\nfile:///etc/passwd\n", {None}),
    "a page in an mp4": (
        lambda: box(b"free", b"<html>") + source("fragments.mp4"), {None}),
    "ts, then gif": (lambda: source("clip.ts") + source("clip.gif"), {None}),
    "three times the same": (lambda: source("clip.ts") * 3, {None}),
}  # fmt: skip


CLAIMS: dict[str, tuple[Callable[[int], bytes], Reason]] = {
    "in one table": (lambda count: samples(count, 1), Reason.BROKEN),
    "in fragments": (run_of_samples, Reason.BROKEN),
    "outside of a movie": (
        lambda count: source("clip.mp4")[:32] + of_track(samples(count, 1)), Reason.BROKEN),
    "with a size of 64 bits": (lambda count: wide(samples(count, 1)), Reason.BROKEN),
    "compressed": (lambda count: packed(samples(count, 1)), Reason.UNSUPPORTED),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_samples_that_are_only_claimed_take_no_memory(name: str) -> None:
    make, reason = CLAIMS[name]
    with worker() as fresh:
        assert answered(fresh, source("clip.mp4")) is None
        before = fresh.peak_bytes()
        assert fresh.look(make(20_000_000)) == Refused(reason)
        assert fresh.peak_bytes() - before < 100 << 20


def test_a_text_that_looks_like_a_table_is_none(strict: Worker) -> None:
    text = box(b"udta", box(b"name", b"in the trunk of a tree: stsz, of which there are many"))
    assert answered(strict, source("clip.mp4") + text) is None


@pytest.mark.parametrize("name", LIES)
def test_what_lies_is_found_out(name: str, strict: Worker) -> None:
    make, expected = LIES[name]
    encoded = make()
    assert answered(strict, encoded) in expected
    facts = strict.look(encoded)
    assert isinstance(facts, VideoFacts | Refused)
    assert answered(strict, source("clip.mp4")) is None


def test_frames_are_counted_before_any_is_decoded(strict: Worker) -> None:
    for encoded in (source("clip.mp4"), source("clip.gif"), source("clip.avi")):
        for most, reason in ((12, None), (11, Reason.TOO_MANY_FRAMES)):
            answer, _ = strict.frames(encoded, FrameChoice(1), max_frames=most)
            assert getattr(answer, "reason", None) is reason


def test_pixels_are_bounded_before_there_are_any(strict: Worker) -> None:
    for name in ("clip.mp4", "clip.gif", "vp9.webm", "clip.ts"):
        for most, reason in ((64 * 64, None), (64 * 64 - 1, Reason.TOO_LARGE)):
            answer, _ = strict.frames(source(name), FrameChoice(1), max_pixels=most)
            assert getattr(answer, "reason", None) is reason


def test_a_part_outside_of_the_video_is_refused(strict: Worker) -> None:
    answer, _ = strict.frames(source("clip.mp4"), FrameChoice(4, start=5.0))
    assert answer == Refused(Reason.OUT_OF_RANGE)


# what points elsewhere


def references(url: bytes) -> list[bytes]:
    """Videos whose frames are said to be in another file, and playlists of it."""
    path = url.removeprefix(b"file://")
    alias = bytes(150)
    for kind, text in ((2, path), (18, path), (0, path)):
        alias += struct.pack(">hH", kind, len(text)) + text + b"\0" * (len(text) % 2)
    elsewhere = [
        struct.pack(">II", 0, 1) + box(b"alis", bytes(4) + alias + struct.pack(">h", -1)),
        struct.pack(">II", 0, 1) + box(b"url ", bytes(4) + url + b"\0"),
    ]
    moved = [
        rebuild(source("mjpeg.mov"), {b"dref": lambda _, body=body: body})  # type: ignore[misc]
        for body in elsewhere
    ]
    playlists = [b"#EXTM3U\n#EXTINF:9,\n" + url + b"\n", b"ffconcat version 1.0\nfile " + url]
    return moved + playlists


def test_nothing_else_is_opened_even_without_a_sandbox(tmp_path: Path) -> None:
    """The library itself is told to open nothing: here nothing else keeps it from doing so."""
    other = tmp_path / "other.mov"
    other.write_bytes(source("clip.mp4"))
    job = LookJob(
        kind="video", treatment="normalized", max_pixels=1 << 24, max_frames=1000, seconds=20
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        web = f"http://127.0.0.1:{server.getsockname()[1]}/x.mov".encode()
        for url in (web, f"file://{other}".encode(), str(other).encode()):
            for encoded in references(url):
                try:
                    facts = look_video(encoded, job)
                    assert facts.codec == "mjpeg"  # its own frames
                except Unreadable:
                    pass
        with pytest.raises(BlockingIOError):
            server.accept()


# chance


@pytest.mark.parametrize("name", SOURCES)
def test_flipped_bits_are_survived(name: str, strict: Worker) -> None:
    draw = random.Random(name)
    whole = source(name)
    for share in (1, 3, 30):
        for _ in range(4):
            damaged = bytearray(whole)
            for _ in range(share):
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            assert answered(strict, bytes(damaged)) in (None, *Reason)


def test_damage_that_h264_notices_is_not_shown(strict: Worker) -> None:
    whole = source("clip.mp4")
    _, clean = strict.frames(whole, CHOICE)
    draw = random.Random(1)
    shown = refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(2):
            damaged[draw.randrange(len(whole) // 3, len(whole))] ^= 1 << draw.randrange(8)
        answer, pictures = strict.frames(bytes(damaged), CHOICE)
        refused += isinstance(answer, Refused)
        if len(pictures) == len(clean):
            pairs = zip(pictures, clean, strict=True)
            shown += any(max(ImageStat.Stat(ImageChops.difference(*one)).mean) > 2 for one in pairs)
    assert refused > 30
    assert shown <= 6  # without a checksum some damage is as good a picture as any


Edit = tuple[str, int, int, bytes]
edits = st.tuples(
    st.sampled_from(["put", "cut", "copy", "end"]),
    st.integers(0, 1 << 16),
    st.integers(1, 64),
    st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0"]),
    ),
)


def edited(whole: bytes, changes: list[Edit]) -> bytes:
    for what, where, length, data in changes:
        at = where % (len(whole) + 1)
        if what == "put":
            whole = whole[:at] + data + whole[at + len(data) :]
        elif what == "cut":
            whole = whole[:at] + whole[at + length :]
        elif what == "copy":
            whole = whole[:at] + whole[at // 2 : at // 2 + length] + whole[at:]
        else:
            whole = whole[:at]
    return whole


@hypothesis.settings(
    max_examples=3000, deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
@hypothesis.given(st.sampled_from(sorted(SOURCES)), st.lists(edits, min_size=1, max_size=6))
def test_whatever_is_done_to_a_video_is_survived(
    strict: Worker, name: str, changes: list[Edit]
) -> None:
    assert answered(strict, edited(source(name), changes)) in (None, *Reason)
