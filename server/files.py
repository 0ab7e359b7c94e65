"""Files that clients have uploaded, to be asked about many times: in memory, for some time, and in
no more than so many bytes. They are known by their content: the same bytes have the same id for
the same API key, whenever they are uploaded and to whichever server, so that a conversation which
names a file is right again as soon as the file is uploaded again.

In memory, because whoever decodes a file needs it there, and because nothing is left of it when the
server ends: no folder to mount, to bound and to clean. Bytes that a request has found stay with the
request, whatever becomes of the file.
"""

import collections
import dataclasses
import hashlib
import math
import operator
import threading
import time
from collections.abc import Callable
from typing import Literal

from preprocessing.media import File, Kind
from wire.errors import NotFound

PREFIX = "file-"
# What is taken beside its bytes by an entry.
OVERHEAD = 1024
# However small they are: to look through more would hold up other requests.
MAX_FILES = 1 << 15

Reason = Literal["expired", "room"]


@dataclasses.dataclass(frozen=True)
class Upload:
    """A file, and what its last upload said of it. ``format`` is what its header says, times are
    seconds since 1970; no two files have the same ``created_at``."""

    id: str
    file: File
    kind: Kind
    format: str
    filename: str
    purpose: str
    created_at: float
    expires_at: float


def as_url(name: str) -> str:
    """What stands for a file where a URL could be. What has not the form of an id is the id of no
    file, and no URL either."""
    return name if name.startswith(PREFIX) else PREFIX + name


Finder = Callable[[str], Upload | None]
"""Finds a file by its id."""


def identity(owner: str, digest: bytes) -> str:
    """The id of a file with this ``content_digest`` of the API key of this name. It can be guessed
    by whoever has the bytes, and is of no use to other keys."""
    parts = owner.encode() + b"\0" + digest
    return PREFIX + hashlib.blake2b(parts, digest_size=20, person=b"internvl-file-id").hexdigest()


def no_file(param: str) -> NotFound:
    """The error for an id that names no file of this tenant."""
    return NotFound(
        f"{param}: there is no such file (any more); upload it again.",
        param=param,
        code="file_not_found",
    )


class FileStore:
    """Keeps files by tenant and id: nobody finds those of another. Where there is no room for a new
    one those go that were used longest ago, of the tenant that takes most with it; ``evicted`` is
    told of each, and of each that has expired. Safe in every thread."""

    def __init__(
        self,
        most: int,
        seconds: float,
        evicted: Callable[[Reason], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._most = most
        self._beside = max(OVERHEAD, most // MAX_FILES)
        self._seconds = seconds
        self._evicted = evicted
        self._clock = clock
        self._lock = threading.Lock()
        self._used = 0
        self._newest = 0.0  # when it came
        self._first_end = math.inf  # nothing expires before
        # Of each tenant, the one that was used longest ago first.
        self._shelves: dict[bytes, collections.OrderedDict[str, Upload]] = {}
        self._weights = collections.Counter[bytes]()

    @property
    def most_bytes(self) -> int:
        """Of the largest file that there can be room for; less than 1 if there is none."""
        return self._most - self._beside

    @property
    def used(self) -> int:
        """Bytes of all files."""
        with self._lock:
            self._expire()
            return self._used

    @property
    def count(self) -> int:
        """Files."""
        with self._lock:
            self._expire()
            return sum(map(len, self._shelves.values()))

    def expire(self) -> None:
        """Forget the files whose time is over. Others look for them too, but nobody may come."""
        with self._lock:
            self._expire()

    def put(
        self,
        tenant: bytes,
        owner: str,
        file: File,
        facts: tuple[Kind, str],
        filename: str,
        purpose: str,
        seconds: float | None = None,
    ) -> Upload:
        """Keep a file of at most ``most_bytes`` for so many ``seconds``, or less; ``facts`` are its
        kind and format. One that is there is renewed in all that is said of it."""
        with self._lock:
            self._expire()
            name = identity(owner, file.digest)
            self._take(tenant, name)
            now = self._clock()
            end = now + min(self._seconds, self._seconds if seconds is None else seconds)
            self._newest = max(now, math.nextafter(self._newest, math.inf))
            upload = Upload(name, file, *facts, filename, purpose, self._newest, end)
            size = self._size(upload)
            while self._used + size > self._most:
                # What comes is never what goes, but counts for whoever has others.
                heaviest = max(
                    self._weights, key=lambda one: self._weights[one] + size * (one == tenant)
                )
                self._drop(heaviest, next(iter(self._shelves[heaviest])), "room")
            self._shelves.setdefault(tenant, collections.OrderedDict())[name] = upload
            self._weigh(tenant, size)
            self._first_end = min(self._first_end, end)
            return upload

    def get(self, tenant: bytes, name: str) -> Upload | None:
        """A file, if it is there."""
        with self._lock:
            self._expire()
            shelf = self._shelves.get(tenant)
            if shelf is None or name not in shelf:
                return None
            shelf.move_to_end(name)
            return shelf[name]

    def all(self, tenant: bytes) -> list[Upload]:
        """The files of a tenant, the oldest first."""
        with self._lock:
            self._expire()
            shelf = self._shelves.get(tenant)
            found = list(shelf.values()) if shelf is not None else []
        return sorted(found, key=operator.attrgetter("created_at"))

    def delete(self, tenant: bytes, name: str) -> bool:
        """Forget a file; says whether there was one."""
        with self._lock:
            self._expire()
            return self._take(tenant, name)

    def _expire(self) -> None:
        now = self._clock()
        if now < self._first_end:
            return
        for tenant, shelf in list(self._shelves.items()):
            for upload in list(shelf.values()):
                if upload.expires_at <= now:
                    self._drop(tenant, upload.id, "expired")
        ends = [one.expires_at for shelf in self._shelves.values() for one in shelf.values()]
        self._first_end = min(ends, default=math.inf)

    def _drop(self, tenant: bytes, name: str, reason: Reason) -> None:
        self._take(tenant, name)
        self._evicted(reason)

    def _take(self, tenant: bytes, name: str) -> bool:
        shelf = self._shelves.get(tenant)
        if shelf is None or name not in shelf:
            return False
        self._weigh(tenant, -self._size(shelf.pop(name)))
        if not shelf:
            del self._shelves[tenant]
            del self._weights[tenant]
        return True

    def _size(self, upload: Upload) -> int:
        return self._beside + len(upload.file.data)

    def _weigh(self, tenant: bytes, size: int) -> None:
        self._used += size
        self._weights[tenant] += size
