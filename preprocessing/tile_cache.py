"""Tiles of pictures that were decoded before, within a number of bytes."""

from collections import OrderedDict

from preprocessing.media import TiledMedia


class TileCache:
    """Pictures by digest; the one asked for longest ago goes first. Belongs to one event loop."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._pictures: OrderedDict[bytes, TiledMedia] = OrderedDict()

    def get(self, digest: bytes) -> TiledMedia | None:
        """The picture, if it is still there."""
        found = self._pictures.get(digest)
        if found is not None:
            self._pictures.move_to_end(digest)
        return found

    def put(self, picture: TiledMedia) -> None:
        """Keep a picture that is not there; one larger than the whole budget is not kept."""
        size = len(picture.tiles)
        if size > self._budget:
            return
        self._pictures[picture.digest] = picture
        self._used += size
        while self._used > self._budget:
            _, oldest = self._pictures.popitem(last=False)
            self._used -= len(oldest.tiles)
