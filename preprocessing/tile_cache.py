"""Tiles of pictures and videos that were decoded before, within a number of bytes."""

from collections import OrderedDict

from preprocessing.media import Loaded


class TileCache:
    """Pictures by digest; the one asked for longest ago goes first. Belongs to one event loop."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._pictures: OrderedDict[bytes, Loaded] = OrderedDict()

    def get(self, digest: bytes) -> Loaded | None:
        """The picture, if it is still there."""
        found = self._pictures.get(digest)
        if found is not None:
            self._pictures.move_to_end(digest)
        return found

    def clear(self) -> None:
        """Forget all."""
        self._pictures.clear()
        self._used = 0

    def put(self, picture: Loaded) -> None:
        """Keep a picture that is not there; one larger than the whole budget is not kept."""
        size = picture.size
        if size > self._budget:
            return
        self._pictures[picture.digest] = picture
        self._used += size
        while self._used > self._budget:
            _, oldest = self._pictures.popitem(last=False)
            self._used -= oldest.size
