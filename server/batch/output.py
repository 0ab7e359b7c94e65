"""The file of answers: a line in it is whole, on the disk, and final. A batch that goes on finds in
it what is done."""

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from server.batch.lines import MAX_LINE, PREFIX, Item, Misfit
from wire.settings import SettingError

_BEGIN = f'{{"id":"{PREFIX}'.encode()


class _Status(msgspec.Struct):
    status_code: int


class _Where(msgspec.Struct):
    line: int | None = None


class _Done(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _Status | None
    error: _Where | None


def digest(custom_id: str) -> bytes:
    """Stands for a name, which may be long."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


class Output:
    """Open until ``close``. ``names`` are digests of the custom_ids that are done, ``numbers`` the
    lines of the input that could not be used and had none; ``answered`` and ``failed`` are how
    many are in the file, ``cut`` the bytes of a line that was torn off and has been removed."""

    def __init__(self, path: Path) -> None:
        """Raises SettingError where the file cannot be written, is another's, or another run
        writes it."""
        self.names: set[bytes] = set()
        self.numbers: set[int] = set()
        self.answered = self.failed = self.cut = 0
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise SettingError(f"{path} cannot be written: {error.strerror}") from None
        try:
            self._take()
            self._size = self._read()
        except BaseException:
            os.close(self._file)
            raise

    def _take(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise SettingError(f"{self._path} is no file that a batch could go on with")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingError(f"another run writes {self._path}") from None

    def _read(self) -> int:
        """The bytes of the lines that are whole; what is behind them is cut off."""
        size = 0
        # No longer than one of the input and its answer could be.
        with open(os.dup(self._file), "rb") as lines:
            while line := lines.readline(2 * MAX_LINE):
                if not line.endswith(b"\n"):
                    break
                self._note(line)
                size += len(line)
        if line:
            # A file that happens to lack its last newline is not ours to cut.
            if not _BEGIN.startswith(line[: len(_BEGIN)]):
                raise self._not_ours()
            self.cut = os.fstat(self._file).st_size - size
            os.ftruncate(self._file, size)
        return size

    def _note(self, line: bytes) -> None:
        try:
            done = msgspec.json.decode(line, type=_Done)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise self._not_ours() from None
        if not done.id.startswith(PREFIX):
            raise self._not_ours()
        if done.custom_id is not None:
            self.names.add(digest(done.custom_id))
        elif done.error is not None and done.error.line is not None:
            self.numbers.add(done.error.line)
        if done.response is not None and 200 <= done.response.status_code < 300:
            self.answered += 1
        else:
            self.failed += 1

    def _not_ours(self) -> SettingError:
        return SettingError(
            f"{self._path} holds something else than the answers of a batch; name another file"
        )

    def left(self, items: Iterable[Item], skip: Callable[[int], None]) -> Iterator[Item]:
        """Those that have no line here, and the others' bytes to ``skip``. What has a name that an
        earlier one has is a misfit."""
        seen: set[bytes] = set()
        for item in items:
            name = None if item.custom_id is None else digest(item.custom_id)
            if name in seen:
                reason = f"an earlier line has the custom_id {str(item.custom_id)[:64]!r}"
                item, name = Misfit(item.number, item.size, None, reason), None
            if name is not None:
                seen.add(name)
            if name in self.names or (name is None and item.number in self.numbers):
                skip(item.size)
            else:
                yield item

    def write(self, lines: Iterable[bytes]) -> None:
        """Return when they are on the disk. Raises OSError when they cannot be; none of them is
        in the file then, unless the process dies first."""
        data = b"".join(lines)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._file, left) :]
            os.fdatasync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        """Let others write it."""
        os.close(self._file)
