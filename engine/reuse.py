"""Which blocks of a sequence others find, and which of others it finds.

The Scheduler alone calls it. Full blocks are shared, from the beginning on; of the block behind
them as much is copied as some block has in common with the sequence.
"""

from engine.blocks import BlockPool
from engine.prefix import GRAIN, extend_digests, first_parent, part_of
from engine.sequence import Sequence


class Prefixes:
    """Looks for sequences in a pool of blocks, and names theirs there."""

    def __init__(self, pool: BlockPool, block_size: int, enabled: bool) -> None:
        self.enabled = enabled
        self._pool = pool
        self._block_size = block_size
        self._flushed = 0  # sequences that arrived before leave nothing

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks that hold a prefix of the sequence, none of which it changes."""
        if not self.enabled:
            return []
        self._name(sequence)
        return self._pool.match(sequence.digests[: sequence.most_cached // self._block_size])

    def find_part(self, sequence: Sequence, full: int) -> tuple[int, int]:
        """A block that begins as the sequence goes on behind the ``full`` blocks found, and how
        many positions of it are the sequence's; 0: there is none."""
        start = full * self._block_size
        end = min(start + self._block_size, sequence.most_cached)
        if not self.enabled or end - start < GRAIN:
            return 0, 0
        wanted = part_of(sequence.token_ids, sequence.items, start, end)
        return self._pool.find_part(_parent(sequence, full), wanted)

    def announce(self, sequence: Sequence) -> None:
        """Let the blocks be found that the steps planned fill, also by sequences of the same step:
        in each layer all keys and values are written before any are read."""
        full = min(sequence.num_planned, len(sequence.token_ids)) // self._block_size
        if not self.enabled or full <= sequence.num_published:
            return
        self._name(sequence)
        if sequence.arrival >= self._flushed:
            for number in range(sequence.num_published, full):
                self._pool.publish(sequence.blocks[number], sequence.digests[number])
        sequence.num_published = full

    def keep(self, sequence: Sequence) -> None:
        """Let the blocks that are full and computed be found by what they begin with, too: a step
        copies before it computes. A token is drawn behind them, which tells whether all that they
        hold are numbers: they are copied whole."""
        self.announce(sequence)
        full = sequence.num_computed // self._block_size
        for number in range(sequence.num_noted, full):
            self._note(sequence, number)
        sequence.num_noted = full

    def leave(self, sequence: Sequence) -> None:
        """Let the block be found that a sequence fills no further, if tokens were drawn behind it:
        one that is not, as in ``keep``, could break who copies it."""
        full = sequence.num_computed // self._block_size
        if self.enabled and full < len(sequence.blocks) and sequence.has_drawn:
            self._name(sequence)
            self._note(sequence, full)

    def distrust(self, sequence: Sequence) -> None:
        """What made a sequence's logits wrong may be in the cache, where others would find it;
        behind a gap too, since the blocks before it may be computed again."""
        self._pool.forget_digests([_parent(sequence, 0), *sequence.digests])

    def flush(self, arrivals: int) -> None:
        """Let nothing be found of sequences that arrived before this one."""
        self._pool.forget(range(self._pool.total))
        self._flushed = arrivals

    def _note(self, sequence: Sequence, number: int) -> None:
        start = number * self._block_size
        end = min(start + self._block_size, sequence.num_computed)
        if end - start >= GRAIN and sequence.arrival >= self._flushed:
            part = part_of(sequence.token_ids, sequence.items, start, end)
            self._pool.note(sequence.blocks[number], _parent(sequence, number), part)

    def _name(self, sequence: Sequence) -> None:
        request, size = sequence.request, self._block_size
        extend_digests(
            sequence.digests, sequence.token_ids, request.items, size, request.cache_salt
        )


def _parent(sequence: Sequence, number: int) -> bytes:
    """What a block of a sequence chains to."""
    return sequence.digests[number - 1] if number else first_parent(sequence.request.cache_salt)
