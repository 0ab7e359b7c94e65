"""Where the time of each choice went: the engine's own figures, completed where it cannot know."""

import dataclasses
import time

from wire.messages import EngineOutput


@dataclasses.dataclass
class Timings:
    """Seconds of a choice that has a token: ``queue`` until it entered its engine's batch,
    ``prefill`` from there to its first token, ``decode`` from there to its last."""

    queue: float
    prefill: float
    decode: float = 0.0

    @property
    def inference(self) -> float:
        """In the batch."""
        return self.prefill + self.decode


class Stopwatch:
    """The Timings of the choices of a request, in ``timings``.

    The engine tells what it has measured. One that is ended here, by a stop string or because its
    client has left, and one that went on in another engine, is measured here behind its first
    token: whoever reads slowly lengthens it, for the engine has gone on meanwhile.
    """

    def __init__(self) -> None:
        self.timings: dict[int, Timings] = {}
        self._since: dict[int, float] = {}  # of choices whose decoding nobody has told

    def add(self, index: int, output: EngineOutput) -> None:
        """Take in an output of a choice; most tell nothing."""
        told = output.times
        if told is None:
            return
        if index not in self.timings:
            self.timings[index] = Timings(told.queue, told.prefill)
            self._since[index] = time.monotonic()
        if told.decode is not None:
            self.timings[index].decode = told.decode
            self._since.pop(index, None)

    def end(self, index: int) -> None:
        """A choice is over, or given up."""
        since = self._since.pop(index, None)
        if since is not None:
            self.timings[index].decode = time.monotonic() - since
