"""Responses that can be asked for again or gone on from: in memory, for some time, and in no more
than so many bytes."""

import collections
import dataclasses
import time
from collections.abc import Callable

# What is taken beside their bytes by an entry, by an item, and by each mention of an item.
OVERHEAD = 512
ITEM = 160
MENTION = 8


@dataclasses.dataclass(frozen=True)
class Stored:
    """A response as JSON, and the items of its conversation, each as JSON: what came before it and
    its own input, ``asked`` together, and its output. Items of one conversation are the same
    objects."""

    body: bytes
    items: tuple[bytes, ...]
    asked: int = 0


def _own_size(entry: Stored) -> int:
    return OVERHEAD + len(entry.body) + MENTION * len(entry.items)


class _Shelf:
    """Of one tenant, the oldest first."""

    def __init__(self) -> None:
        self.entries: collections.OrderedDict[str, tuple[float, Stored]] = collections.OrderedDict()
        self.used = 0
        self._users: collections.Counter[int] = collections.Counter()  # of an item, by its identity

    def put(self, name: str, until: float, entry: Stored) -> None:
        self.entries[name] = until, entry
        self.used += _own_size(entry)
        for item in entry.items:
            if not self._users[id(item)]:
                self.used += ITEM + len(item)
            self._users[id(item)] += 1

    def drop(self, name: str) -> None:
        _, entry = self.entries.pop(name)
        self.used -= _own_size(entry)
        for item in entry.items:
            self._users[id(item)] -= 1
            if not self._users[id(item)]:
                del self._users[id(item)]
                self.used -= ITEM + len(item)

    @property
    def oldest(self) -> str:
        return next(iter(self.entries))


class ResponseStore:
    """Keeps entries by tenant and name: nobody finds those of another. Where there is no room the
    oldest go first, of the tenant that takes most."""

    def __init__(
        self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._shelves: dict[bytes, _Shelf] = {}

    @property
    def used(self) -> int:
        """Bytes of all entries."""
        return sum(shelf.used for shelf in self._shelves.values())

    def put(self, tenant: bytes, name: str, entry: Stored) -> bool:
        """Keep an entry; says whether it is kept."""
        self.expire()
        if not self.fits(entry):
            return False  # all others would go in vain
        shelf = self._shelves.setdefault(tenant, _Shelf())
        shelf.put(name, self._clock() + self._seconds, entry)
        while self.used > self._most:
            heaviest = max(self._shelves, key=lambda one: self._shelves[one].used)
            self._drop(heaviest, self._shelves[heaviest].oldest)
        return self._find(tenant, name) is not None

    def fits(self, entry: Stored) -> bool:
        """Whether there would be room for an entry if there were no others."""
        distinct = {id(item): item for item in entry.items}.values()
        return _own_size(entry) + sum(ITEM + len(item) for item in distinct) <= self._most

    def get(self, tenant: bytes, name: str) -> Stored | None:
        """An entry, if it is there."""
        self.expire()
        return self._find(tenant, name)

    def delete(self, tenant: bytes, name: str) -> bool:
        """Forget an entry; says whether there was one."""
        found = self.get(tenant, name) is not None
        if found:
            self._drop(tenant, name)
        return found

    def _find(self, tenant: bytes, name: str) -> Stored | None:
        shelf = self._shelves.get(tenant)
        return shelf.entries[name][1] if shelf and name in shelf.entries else None

    def expire(self) -> None:
        """Forget the entries whose time is over."""
        now = self._clock()
        for tenant, shelf in list(self._shelves.items()):
            while shelf.entries and shelf.entries[shelf.oldest][0] <= now:
                self._drop(tenant, shelf.oldest)

    def _drop(self, tenant: bytes, name: str) -> None:
        shelf = self._shelves[tenant]
        shelf.drop(name)
        if not shelf.entries:
            del self._shelves[tenant]
