"""Forms with a file: read the same however they arrive, and refused when they are none."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.budget import Budget
from server.admission import FORM_BYTES
from server.errors import UnsupportedMediaType
from server.multipart import MAX_FIELD, MAX_FILENAME, MAX_HEADER, MAX_PARTS, UploadForm, read_upload
from wire.errors import BodyTooLarge, InvalidRequest, ServiceError, Unavailable

BOUNDARY = b"----boundary"
TYPE = "multipart/form-data; boundary=----boundary"
Part = tuple[bytes, bytes]


def part(disposition: bytes, data: bytes, more: bytes = b"") -> bytes:
    head = b"Content-Disposition: form-data; " + disposition + b"\r\n" + more
    return b"--" + BOUNDARY + b"\r\n" + head + b"\r\n" + data + b"\r\n"


END = b"--" + BOUNDARY + b"--\r\n"
FILE = b'name="file"; filename="a.png"'
PURPOSE = part(b'name="purpose"', b"vision")


def read(
    body: bytes, *, pieces: Callable[[bytes], Iterator[bytes]] | None = None, **options: int
) -> tuple[bytes | None, UploadForm]:
    """What a form holds, and its reader."""

    async def arriving() -> AsyncIterator[bytes]:
        for piece in pieces(body) if pieces else iter([body]):
            yield piece

    async def run() -> tuple[bytes | None, UploadForm]:
        budget = Budget(options.get("room", 1 << 20))
        async with budget.share(0) as room:
            form = await read_upload(TYPE, arriving(), options.get("most", 1 << 20), room)
            assert budget.used == len(form.file or b"")
        assert budget.used == 0
        return form.file, form

    return asyncio.run(run())


def refused(body: bytes, **options: int) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        read(body, **options)
    return caught.value


@given(
    data=st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from([b"\r\n", b"--", BOUNDARY, b"\r\n--" + BOUNDARY[:-1], b"x", b"\r"]),
            max_size=20,
        ).map(b"".join),
    ),
    cuts=st.lists(st.integers(0, 500)),
    first=st.booleans(),
)
def test_however_a_form_is_cut_it_holds_the_same(data: bytes, cuts: list[int], first: bool) -> None:
    if b"\r\n--" + BOUNDARY in b"\r\n" + data:
        data = data.replace(BOUNDARY, b"")
    parts = [part(FILE, data, b"Content-Type: image/png\r\n"), PURPOSE]
    body = b"".join(parts if first else reversed(parts)) + END
    at = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})

    def pieces(whole: bytes) -> Iterator[bytes]:
        return (whole[a:b] for a, b in itertools.pairwise(at))

    found, reader = read(body, pieces=pieces)
    assert found == data
    assert (reader.fields, reader.filename) == ({"purpose": "vision"}, "a.png")


@given(body=st.binary(max_size=300), cut=st.integers(0, 300))
def test_whatever_comes_is_read_or_refused(body: bytes, cut: int) -> None:
    for whole in (body, b"--" + BOUNDARY + b"\r\n" + body, part(FILE, b"x") + body):
        with contextlib.suppress(InvalidRequest, BodyTooLarge):
            read(whole, pieces=lambda all: iter([all[:cut], all[cut:]]))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\r\n",
        PURPOSE,
        PURPOSE + part(FILE, b"x"),
        PURPOSE + END[:-4],
        b"no form",
        b"--other\r\n\r\nx\r\n--other--\r\n",
        b"--" + BOUNDARY + b"\n" + b"x",
        b"--" + BOUNDARY + b"\r\nno header\r\n\r\nx\r\n" + END,
        b"--" + BOUNDARY + b"\r\n: x\r\n\r\nx\r\n" + END,
        b"--" + BOUNDARY + b"\r\nContent-Disposition: attachment; name=file\r\n\r\nx\r\n" + END,
        b"--" + BOUNDARY + b"\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END,
        part(FILE, b"x", b'Content-Disposition: form-data; name="purpose"\r\n') + END,
        b"--" + BOUNDARY + b"\r\nX-Bytes: \xff\0\r\n\r\nx\r\n" + END,
        part(b'name="\xff"', b"x") + END,
        part(b'name="purpose"', b"\xff") + END,
    ],
)
def test_what_is_no_whole_form_is_refused(body: bytes) -> None:
    error = refused(body)
    assert isinstance(error, InvalidRequest)
    assert "form" in error.message or "UTF-8" in error.message


async def read_nothing(content_type: str) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"never read"
        raise AssertionError

    async with Budget(1).share(0) as room:
        await read_upload(content_type, pieces(), 1, room)


@pytest.mark.parametrize(
    "given",
    ["", "application/json", "multipart/mixed; boundary=x", "application/x-www-form-urlencoded"],
)
async def test_another_type_of_body_is_415(given: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        await read_nothing(given)


@pytest.mark.parametrize("given", ["", "; boundary", '; boundary=""', "; boundary=" + 71 * "x"])
async def test_a_form_without_a_boundary_that_can_be_one_is_refused(given: str) -> None:
    with pytest.raises(InvalidRequest, match="boundary"):
        await read_nothing("multipart/form-data" + given)


def test_a_boundary_stands_in_no_file() -> None:
    almost = (b"\r\n--" + BOUNDARY + b"x") * 990
    assert read(part(FILE, almost) + END)[0] == almost
    error = refused(part(FILE, almost * 2) + END)
    assert isinstance(error, InvalidRequest)
    assert "boundary" in error.message


def test_what_is_not_the_file_is_bounded() -> None:
    file = b"x" * (2 * FORM_BYTES)
    assert read(part(FILE, file) + END)[0] == file
    blanks = b" " * (FORM_BYTES // 2)
    padded = b"--" + BOUNDARY + blanks + b"\r\n" + part(FILE, file).partition(b"\r\n")[2]
    assert read(PURPOSE + padded + END)[0] == file
    for body in (
        PURPOSE + padded.replace(blanks, blanks * 2),
        part(FILE, b"x") + END + blanks * 2,
        b"\r\n" * FORM_BYTES + part(FILE, b"x") + END,
    ):
        error = refused(body)
        assert isinstance(error, InvalidRequest)
        assert f"{FORM_BYTES} bytes beside" in error.message


def test_there_is_one_file_and_each_field_once() -> None:
    for body in (part(FILE, b"x") + part(FILE, b"y"), PURPOSE + PURPOSE):
        error = refused(body + END)
        assert error.param in ("file", "purpose")
        assert "once" in error.message


def test_names_of_parts_and_headers_are_bounded() -> None:
    assert isinstance(refused(part(FILE, b"x", b"A: b\r\n" * 9) + END), InvalidRequest)
    assert isinstance(refused(part(FILE, b"x", b"A: " + MAX_HEADER * b"b") + END), InvalidRequest)
    assert isinstance(refused(part(FILE, b"x", MAX_HEADER * b"A" + b": b") + END), InvalidRequest)
    many = b"".join(part(b'name="%d"' % number, b"") for number in range(MAX_PARTS + 1))
    assert f"{MAX_PARTS} parts" in refused(many + END).message
    assert refused(part(b'name="purpose"', b"x" * (MAX_FIELD + 1)) + END).param == "purpose"
    read(part(b'name="purpose"', b"x" * MAX_FIELD) + END)


def test_a_file_ends_at_its_limit_and_where_there_is_no_room_for_more() -> None:
    body = part(FILE, b"x" * 100) + END
    assert read(body, most=100)[0] == b"x" * 100
    error = refused(body, most=99)
    assert isinstance(error, BodyTooLarge)
    assert (error.param, error.status) == ("file", 413)
    assert "99 bytes" in error.message
    assert read(body, room=100)[0]
    assert isinstance(refused(body, room=99), Unavailable)


def test_a_form_may_have_no_file() -> None:
    assert read(PURPOSE + END)[0] is None


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (b"a.png", "a.png"),
        (b"../../etc/passwd", "passwd"),
        (b"C:\\\\pictures\\\\a.png", "a.png"),
        ("größe ☃.png".encode(), "größe ☃.png"),
        (b"", "upload"),
        (b"folder/", "upload"),
        (b'a\\"b.png', 'a"b.png'),
        (b"x" * MAX_FILENAME, "x" * MAX_FILENAME),
    ],
)
def test_of_a_filename_only_the_last_part_counts(given: bytes, name: str) -> None:
    body = part(b'name="file"; filename="' + given + b'"', b"x") + END
    assert read(body)[1].filename == name


@pytest.mark.parametrize(
    "given", [b"x" * (MAX_FILENAME + 1), b"a\tb", b"a\x7fb", "a\u202eb".encode(), b"\xff.png"]
)
def test_a_filename_that_could_mislead_is_refused(given: bytes) -> None:
    error = refused(part(b'name="file"; filename="' + given + b'"', b"x") + END)
    assert "filename" in error.message
    assert isinstance(error, InvalidRequest)
