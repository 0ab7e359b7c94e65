"""The logical side of the vision cache: which encoder outputs exist and who still needs them.

Only the Scheduler calls it; the tensors themselves are the runner's, which is told by each plan
what to encode and what to drop. Entries are shared by digest, and encoded tile by tile: whoever
needs a tile first has it encoded. An entry that nobody references stays, with the tiles it has, for
the next sequence with the same picture until its room is needed.
"""


class EncoderEntry:
    """One encoder output: its size in bytes with all tiles, how many sequences reference it, and
    the tiles that exist or will when the steps planned are done."""

    __slots__ = ("references", "size", "tiles")

    def __init__(self, size: int) -> None:
        self.size = size
        self.references = 1
        self.tiles: set[int] = set()


class VisionCache:
    """Entries within a budget of bytes.

    The budget is kept with one exception: an entry larger than all of it is admitted when
    nothing else is referenced, and dropped as soon as it is released.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._pinned = 0  # bytes of referenced entries
        self._entries: dict[bytes, EncoderEntry] = {}
        self._idle: dict[bytes, None] = {}  # unreferenced digests, released longest ago first
        self._stale: set[bytes] = set()  # to be dropped when they are released
        self._dropped: list[bytes] = []

    def acquire(self, digest: bytes) -> bool:
        """Reference an entry that exists; False if there is none."""
        entry = self._entries.get(digest)
        if entry is None:
            return False
        if entry.references == 0:
            del self._idle[digest]
            self._pinned += entry.size
        entry.references += 1
        return True

    def reserve(self, digest: bytes, size: int) -> bool:
        """Make a new, referenced entry, evicting idle ones for it; False if there is no room.

        The caller plans the encoding of a tile in the same step.
        """
        if self._pinned and self._pinned + size > self.budget:
            return False
        self._evict(size)
        self._entries[digest] = EncoderEntry(size)
        self.used += size
        self._pinned += size
        return True

    def has_tile(self, digest: bytes, tile: int) -> bool:
        """Whether a tile of this picture is encoded or planned."""
        entry = self._entries.get(digest)
        return entry is not None and tile in entry.tiles

    def add_tile(self, digest: bytes, tile: int) -> None:
        """The encoding of one more tile of an entry is planned."""
        self._entries[digest].tiles.add(tile)

    def release(self, digest: bytes) -> None:
        """Give back one reference, after the last position that reads the entry is computed."""
        entry = self._entries[digest]
        entry.references -= 1
        if entry.references == 0:
            self._idle[digest] = None
            self._pinned -= entry.size
            if digest in self._stale:
                self._drop(digest)
            self._evict(0)

    def flush(self) -> None:
        """Drop what nobody references now, and what is referenced as soon as nobody does."""
        self._stale = set(self._entries)
        for digest in list(self._idle):
            self._drop(digest)

    def take_dropped(self) -> list[bytes]:
        """Digests evicted since the last call; the plan must tell the runner to drop them."""
        dropped, self._dropped = self._dropped, []
        return dropped

    @property
    def has_dropped(self) -> bool:
        """Whether there is something for the next plan to drop."""
        return bool(self._dropped)

    @property
    def num_referenced(self) -> int:
        """Entries that some sequence still needs."""
        return len(self._entries) - len(self._idle)

    def _evict(self, size: int) -> None:
        while self._idle and self.used + size > self.budget:
            self._drop(next(iter(self._idle)))

    def _drop(self, digest: bytes) -> None:
        del self._idle[digest]
        self._stale.discard(digest)
        self.used -= self._entries.pop(digest).size
        self._dropped.append(digest)

    def check(self) -> None:
        """Raise AssertionError where the cache contradicts itself."""
        entries = self._entries
        assert self.used == sum(entry.size for entry in entries.values())
        assert self._pinned == sum(e.size for e in entries.values() if e.references)
        assert set(self._idle) == {d for d, e in entries.items() if e.references == 0}
        assert self._stale <= {d for d, e in entries.items() if e.references}
        assert all(entry.references >= 0 for entry in entries.values())
        assert self.used <= self.budget or len(entries) == 1, "the vision budget is exceeded"
