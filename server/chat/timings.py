"""Where the time of each choice went, as the engine and its client tell."""

import dataclasses

from wire.messages import EngineOutput


@dataclasses.dataclass
class Timings:
    """Seconds of a choice that has a token: ``queue`` until it entered its engine's batch,
    ``prefill`` from there to its first token, ``decode`` from there to the last of its
    ``tokens``. Those behind a stop string count in both: they have taken the time too."""

    queue: float
    prefill: float
    decode: float = 0.0
    tokens: int = 0

    @property
    def inference(self) -> float:
        """In the batch."""
        return self.prefill + self.decode


class Stopwatch:
    """The Timings of the choices of a request, in ``timings``."""

    def __init__(self) -> None:
        self.timings: dict[int, Timings] = {}

    def add(self, index: int, output: EngineOutput) -> None:
        """Take in an output of a choice."""
        told = output.times
        if told is None:
            return
        if index not in self.timings:
            self.timings[index] = Timings(told.queue, told.prefill)
        timings = self.timings[index]
        timings.tokens += len(output.token_ids)
        if told.decode is not None:
            timings.decode = told.decode
