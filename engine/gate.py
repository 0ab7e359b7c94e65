"""How far a prompt may go in a step: as far as there is time, and its pictures are encoded.

Used by the Scheduler alone, for every sequence with more than one position to compute.
"""

from engine.draft import Draft
from engine.sequence import Sequence
from engine.vision_cache import VisionCache
from wire.messages import Ready, VisionItem


class Gate:
    """Asks the vision cache for the tiles that positions show, and plans those it lacks.

    ``queries`` counts a picture of a sequence once, however often the sequence is preempted, and
    ``hits`` those that were there, with all their tiles or some."""

    def __init__(self, vision: VisionCache, ready: Ready) -> None:
        self._vision = vision
        self._tokens_per_tile = ready.geometry.tokens_per_tile
        self._bytes_per_token = ready.vision_token_bytes
        self.encoded_tiles = self.queries = self.hits = 0

    def reach(self, sequence: Sequence, count: int, draft: Draft) -> int:
        """How many of the next ``count`` positions can be computed in this step.

        References every encoder output those positions read, and plans the encoding of the tiles
        that do not exist yet. Stops before the first tile that has to wait.
        """
        start = sequence.num_planned
        count = draft.time.fit(start, count)
        for item in sequence.items[sequence.next_span :]:
            at = max(item.offset, start)
            while at < min(item.offset + item.length, start + count):
                tile = (at - item.offset) // self._tokens_per_tile
                if not self._open(sequence, item, tile, at - start, draft):
                    return at - start
                # A tile is planned with the first position behind it, whatever rounding says.
                count = max(at - start + 1, draft.time.fit(start, count))
                at = item.offset + (tile + 1) * self._tokens_per_tile
        return count

    def _open(
        self, sequence: Sequence, item: VisionItem, tile: int, before: int, draft: Draft
    ) -> bool:
        """Reference a picture, and have one of its tiles encoded if it is not; the step computes
        ``before`` positions of the sequence before those that show the tile.

        While one sequence waits, none behind it may take up a picture; but what is held is
        encoded further, since it may be what the others wait for.
        """
        vision, held = self._vision, item.digest in sequence.held
        missing = not vision.has_tile(item.digest, tile)
        if not (held or draft.gate_open):
            return False
        if missing and not (draft.tiles and draft.time.fits_tile(sequence.num_planned, before)):
            draft.gate_open = False
            return False
        if not held:
            size = item.length * self._bytes_per_token
            found = vision.acquire(item.digest)
            if not (found or vision.reserve(item.digest, size)):
                draft.gate_open = False
                return False
            sequence.held.append(item.digest)
            if item.digest not in sequence.sought and not sequence.request.output:
                sequence.sought.add(item.digest)
                self.queries += 1
                self.hits += found
        if missing:
            vision.add_tile(item.digest, tile)
            draft.encode_tile(sequence.id, item.digest, tile)
            self.encoded_tiles += 1
        return True
