"""HEIC, as phones write it, through a decode worker in its sandbox."""

import io
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from preprocessing.media import (
    Answer,
    LookJob,
    PictureFacts,
    Reason,
    Refused,
    Tiled,
    TileJob,
    TileSettings,
    Treatment,
)
from tests import clips
from tests.pictures import encode, picture, promise, sample, stored, turned
from tests.process.test_video import VARIANTS
from tests.sandboxed import SIDE, Worker, worker
from wire.channel import ChannelClosed

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the filter of system calls")

# No turn of it equals another; as large as a tile, so that nothing is resized.
SHOWN = picture(SIDE, SIDE)
LIMIT = 1_000_000


@pytest.fixture(scope="module")
def heic() -> Iterator[Worker]:
    """One worker for all of it, that nothing here may end; it has 300 MiB."""
    with worker(memory=300 << 20) as started:
        yield started
        assert started.process.poll() is None


def show(
    heic: Worker, encoded: bytes, treatment: Treatment = "normalized"
) -> tuple[Answer, Image.Image | None]:
    settings = TileSettings(SIDE, 1, 1, True, treatment)
    job = TileJob(settings=settings, max_pixels=LIMIT, seconds=10)
    answer, pictures = heic.ask(job, encoded)
    return answer, pictures[0] if pictures else None


def look(heic: Worker, encoded: bytes, treatment: Treatment = "normalized") -> Answer:
    job = LookJob(kind="image", treatment=treatment, max_pixels=LIMIT, max_frames=9, seconds=10)
    return heic.ask(job, encoded)[0]


def differs(shown: Image.Image | None, expected: Image.Image) -> float:
    """Mean difference in levels of 255."""
    assert shown is not None
    return float(np.abs(np.asarray(shown).astype(int) - np.asarray(expected)).mean())


@pytest.mark.parametrize("treatment", ["normalized", "reference"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_once(heic: Worker, orientation: int, treatment: Treatment) -> None:
    """The encoder writes the turn into the picture and leaves the EXIF tag, as phones do."""
    upright = picture(200, 120)
    encoded = encode(stored(upright, orientation), "HEIF", exif=turned(orientation), quality=90)
    facts = look(heic, encoded, treatment)
    assert facts == PictureFacts("HEIF", 200, 120, orientation)
    answer, seen = show(heic, encoded, treatment)
    assert isinstance(answer, Tiled)
    assert (answer.width, answer.height) == (200, 120)
    assert differs(seen, upright.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) < 2


def test_a_tag_alone_turns_nothing(heic: Worker) -> None:
    """ISO/IEC 23008-12: what turns a picture is its property, whatever stands in EXIF."""
    encoded = encode(SHOWN, "HEIF", exif=turned(1), quality=90)
    tag = struct.pack(">HHIH", 0x0112, 3, 1, 1)
    little = struct.pack("<HHIH", 0x0112, 3, 1, 1)
    assert (tag in encoded) != (little in encoded)
    six = encoded.replace(tag, tag[:-1] + b"\6").replace(little, little[:-2] + b"\6\0")
    assert look(heic, six) == PictureFacts("HEIF", SIDE, SIDE, 6)
    assert differs(show(heic, six)[1], SHOWN) < 2


def test_alpha_is_laid_on_white_or_dropped(heic: Worker) -> None:
    clear = SHOWN.copy()
    clear.putalpha(Image.new("L", SHOWN.size, 0))
    encoded = encode(clear, "HEIF", quality=100)
    assert differs(show(heic, encoded)[1], Image.new("RGB", SHOWN.size, "white")) < 1
    assert differs(show(heic, encoded, "reference")[1], SHOWN) < 2


@pytest.mark.parametrize("mode", ["RGB;16", "I;16"])
def test_ten_bits_become_eight(heic: Worker, mode: str) -> None:
    expected = SHOWN if mode == "RGB;16" else SHOWN.getchannel(0)
    wide = np.asarray(expected).astype("<u2") * 257
    sink = io.BytesIO()
    pillow_heif.from_bytes(mode, SHOWN.size, wide.tobytes()).save(sink, quality=-1, chroma=444)
    assert differs(show(heic, sink.getvalue())[1], expected.convert("RGB")) < 2


def test_of_several_pictures_the_primary_one_is_shown(heic: Worker) -> None:
    several = pillow_heif.from_pillow(Image.new("RGB", (64, 64)))
    several.add_from_pillow(SHOWN)
    sink = io.BytesIO()
    several.save(sink, primary_index=1, quality=95)
    assert look(heic, sink.getvalue()) == PictureFacts("HEIF", SIDE, SIDE, 1, 2)
    assert differs(show(heic, sink.getvalue())[1], SHOWN) < 2


def test_the_brand_of_any_heif_is_enough(heic: Worker) -> None:
    encoded = encode(SHOWN, "HEIF", quality=95)
    for brand in (b"mif1", b"heix"):
        assert differs(show(heic, encoded[:8] + brand + encoded[12:])[1], SHOWN) < 2
    avif = encode(SHOWN, "AVIF", quality=95)
    assert differs(show(heic, avif[:8] + b"mif1" + avif[12:])[1], SHOWN) < 2


TILED = encode(picture(256, 256), "HEIF", tile_size=64, quality=90)


def test_a_picture_in_tiles_is_put_together(heic: Worker) -> None:
    expected = picture(256, 256).resize(SHOWN.size, Image.Resampling.BICUBIC)
    assert b"grid" in TILED
    assert differs(show(heic, TILED)[1], expected) < 2


@pytest.mark.parametrize("kind", ["one", "tiles"])
def test_a_cut_file_is_refused(heic: Worker, kind: str) -> None:
    encoded = TILED if kind == "tiles" else encode(SHOWN, "HEIF")
    for end in range(16, len(encoded), len(encoded) // 40):
        answer, _ = show(heic, encoded[:end])
        assert answer == Refused(Reason.BROKEN), end


def test_a_sequence_without_a_still_picture_is_no_picture(heic: Worker, tmp_path: Path) -> None:
    film = clips.encode(tmp_path / "film.mp4", VARIANTS["hevc.mp4"][0])
    for brand in (b"hevc", b"msf1"):
        assert look(heic, film[:8] + brand + film[12:]) == Refused(Reason.UNSUPPORTED)


def resized(encoded: bytes, old: int, new: int) -> bytes:
    """Every picture of this size says that it is larger."""
    before, after = (b"ispe\0\0\0\0" + struct.pack(">II", side, side) for side in (old, new))
    assert before in encoded
    return encoded.replace(before, after)


def grid(encoded: bytes, side: int) -> bytes:
    """The canvas of TILED gets another size, in its item too."""
    item = struct.pack(">BBBBHH", 0, 0, 3, 3, 256, 256)
    assert item in encoded
    bigger = struct.pack(">BBBBHH", 0, 0, 3, 3, side, side)
    return resized(encoded, 256, side).replace(item, bigger)


TOO_LARGE = {
    "a promise": lambda: promise("HEIF", 30_000, 30_000),
    "two thousand million pixels": lambda: promise("HEIF", 46_000, 46_000),
    "huge tiles": lambda: resized(TILED, 64, 30_000),
    "a huge canvas": lambda: grid(TILED, 30_000),
    "much cut off": lambda: resized(sample("HEIF"), 64, 30_000),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_bomb_is_refused_from_its_header(heic: Worker, name: str) -> None:
    assert look(heic, TOO_LARGE[name]()) == Refused(Reason.TOO_LARGE)
    assert show(heic, TOO_LARGE[name]())[0] == Refused(Reason.TOO_LARGE)


def test_a_stream_larger_than_its_header_is_refused(heic: Worker) -> None:
    """Sixteen times the pixels that the file admits; still within what a worker may take."""
    encoded = resized(encode(Image.new("RGB", (1024, 1024)), "HEIF", quality=1), 1024, 256)
    assert isinstance(look(heic, encoded), PictureFacts)
    assert isinstance(show(heic, encoded)[0], Refused)


def test_a_stream_that_does_not_fit_into_memory_costs_its_worker_at_most() -> None:
    """Where memory runs out inside libde265, C++ ends the process."""
    black = Image.new("RGB", (2048, 2048))
    options = {"quality": 1, "enc_params": {"preset": "ultrafast"}}
    encoded = resized(encode(black, "HEIF", **options), 2048, 256)
    with worker(memory=20 << 20) as small:
        try:
            answer: object = show(small, encoded)[0]
        except (ChannelClosed, OSError):
            assert small.process.wait(60) < 0
        else:
            assert isinstance(answer, Refused)
            assert small.process.poll() is None


def test_pictures_that_refer_to_themselves_are_refused(heic: Worker) -> None:
    one = encode(SHOWN, "HEIF")
    for kind in (b"grid", b"iovl", b"iden", b"tmap", b"unci"):
        assert isinstance(show(heic, one.replace(b"hvc1", kind))[0], Refused), kind


def test_a_name_that_is_no_text_is_not_read(heic: Worker) -> None:
    """The kind of a metadata item; pi-heif 1.4.0's own plugin follows a null pointer."""
    encoded = encode(SHOWN, "HEIF", quality=95, exif=turned(1))
    item = encoded.index(b"Exif", encoded.index(b"iinf"))
    nameless = encoded[:item] + b"\xff\xfe\xfd\xfc" + encoded[item + 4 :]
    assert differs(show(heic, nameless)[1], SHOWN) < 2


def test_no_thread_is_left_behind(heic: Worker) -> None:
    show(heic, TILED)
    assert len(list(Path(f"/proc/{heic.process.pid}/task").iterdir())) == 1


def test_flipped_bytes_never_end_the_worker(heic: Worker) -> None:
    shown = 0
    rng = np.random.default_rng(7)
    for encoded in (TILED, encode(SHOWN, "HEIF")):
        for _ in range(150):
            bad = np.frombuffer(encoded, np.uint8).copy()
            bad[rng.integers(24, len(bad), 4)] = rng.integers(0, 256, 4)
            shown += isinstance(show(heic, bad.tobytes())[0], Tiled)
    assert shown < 300


def test_where_no_filter_guards_threads_heic_is_refused_by_name() -> None:
    """A worker on a kernel without seccomp."""
    code = """
import socket, sys
from preprocessing import sandbox, worker

def missing(_):
    raise OSError

sandbox.deny_calls = missing
worker.main(int(sys.argv[1]))
"""
    with worker(command=["-c", code]) as unguarded:
        assert look(unguarded, sample("HEIF")) == Refused(Reason.NO_HEIC)
        assert show(unguarded, sample("HEIF"))[0] == Refused(Reason.NO_HEIC)
        assert isinstance(show(unguarded, sample("PNG"))[0], Tiled)


def test_a_worker_without_the_library_refuses_heic_by_name() -> None:
    code = """
import sys
sys.modules["_pi_heif"] = None
from preprocessing import worker
worker.main(int(sys.argv[1]))
"""
    with worker(command=["-c", code]) as without:
        assert look(without, sample("HEIF")) == Refused(Reason.NO_HEIC)
