"""The messages between the ranks of one model: one tagged union per direction."""

import msgspec

from engine.plan import StepPlan
from wire.messages import EngineRequest, LogLevel, Progress
from wire.settings import EngineSettings


class Join(msgspec.Struct, frozen=True, tag="join"):
    """What a rank is told first: which one it is of how many, and what it loads.

    It is process ``index`` of ``each`` on its host. The ranks of a group find each other at
    ``address``. ``checkpoint`` is the digest of the folder that ``settings`` name.
    """

    settings: EngineSettings
    rank: int
    size: int
    index: int
    each: int
    address: tuple[str, int]
    checkpoint: bytes
    log_level: str
    log_format: str


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """In place of Join: there is no place for this process, and why."""

    why: str


class Upload(msgspec.Struct, frozen=True, tag="upload"):
    """Call ``Runner.upload``; the tiles travel beside it."""

    request: EngineRequest


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Call ``Runner.begin``."""

    plan: StepPlan


class Sample(msgspec.Struct, frozen=True, tag="sample"):
    """Call ``Runner.sample``."""


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """Call ``Runner.finish``."""


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The rank has what it needs, and obeys."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The rank is about to exit: why, for the log only."""

    text: str


Order = Upload | Begin | Sample | Finish | LogLevel
ToRank = Join | Refusal | Order
FromRank = Progress | Loaded | Failed
