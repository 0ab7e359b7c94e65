"""How many tiles and frames the pictures and videos of a request get. Pure arithmetic on what their
headers say; the tiles themselves are cut by preprocessing, which counts with the same function.

Every part has a ladder of views, from the smallest to the one it asks for. A budget is shared
fairly among them: nobody gets more than an equal part while somebody else has to do with less than
it asks for. A video gives frames first, and tiles of each frame when one frame is left.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Sequence

import msgspec

from preprocessing import MediaPart
from preprocessing.frames import segment_middles
from preprocessing.grid import tile_count
from preprocessing.media import Facts, FrameChoice, Reason, TileSettings, VideoFacts, refusal
from server.schemas.chat import VisualBudget
from wire.errors import ContextTooLong, InvalidRequest
from wire.geometry import VisionGeometry

# Parts that a message names one by one.
_NAMED = 8


def listed(numbers: Iterable[int]) -> str:
    """Their sum, and what it is of: "60 (48 + 12)"."""
    each = list(numbers)
    if len(each) < 2:
        return str(sum(each))
    more = " + …" if len(each) > _NAMED else ""
    return f"{sum(each)} ({' + '.join(map(str, each[:_NAMED]))}{more})"


@dataclasses.dataclass(frozen=True)
class View:
    """A part as it could be shown: with so many ``tiles`` in each of its pictures or frames."""

    part: MediaPart
    shots: tuple[int, ...]

    @property
    def tiles(self) -> int:
        """All of them."""
        return sum(self.shots)

    @property
    def held(self) -> MediaPart:
        """The part, held to the frames that were counted: where they stand at unequal distances,
        the time that is asked for may have more of them."""
        choice = self.part.choice
        if choice is None or (choice.fps, choice.start, choice.end) == (None, None, None):
            return self.part
        choice = msgspec.structs.replace(choice, most=len(self.shots))
        return dataclasses.replace(self.part, choice=choice)


@dataclasses.dataclass(frozen=True)
class Price:
    """What a tile costs, and what a frame costs besides its tiles."""

    tile: int
    frame: int = 0

    def of(self, view: View) -> int:
        """The whole view."""
        frames = len(view.shots) if view.part.kind == "video" else 0
        return view.tiles * self.tile + frames * self.frame


def most_tiles(part: MediaPart, geometry: VisionGeometry) -> int:
    """Tiles of a part of which nothing is known yet, at most."""
    shots = 1 if part.choice is None else part.choice.most
    return shots * TileSettings.for_part(geometry, part).most_tiles


def ladder(
    part: MediaPart, facts: Sequence[Facts], geometry: VisionGeometry, *, gives: bool
) -> list[View]:
    """The views of a part, the smallest first; only the one it asks for unless it ``gives``.

    Raises MediaRefused for a video that has no frames in the time that is asked for.
    """
    wanted = _view(part, facts, geometry)
    if not gives:
        return [wanted]
    views = [wanted]
    if part.kind == "video":
        for shown in range(len(wanted.shots) - 1, 0, -1):
            views.append(_view(_fewer(part, shown), facts, geometry))
    settings = TileSettings.for_part(geometry, part)
    for most in range(settings.max_tiles - 1, settings.min_tiles - 1, -1):
        views.append(_view(dataclasses.replace(views[-1].part, max_tiles=most), facts, geometry))
    # Each number of tiles is worth one view, that which is nearest to what was asked. Fewer
    # pictures of different sizes may have more tiles: nothing is gained by those.
    steps: dict[int, View] = {}
    for view in views:
        if view.tiles <= wanted.tiles:
            steps.setdefault(view.tiles, view)
    return [steps[tiles] for tiles in sorted(steps)]


def share(ladders: Sequence[Sequence[View]], budget: int, price: Price) -> list[View] | None:
    """A view of each ladder that cost no more than ``budget`` together; None if there are none."""
    ladders = [sorted(views, key=price.of) for views in ladders]
    costs = [list(map(price.of, views)) for views in ladders]
    if sum(steps[0] for steps in costs) > budget:
        return None

    def taken(level: int) -> list[int]:
        """The last step of each ladder that costs no more than ``level``; never less than one."""
        return [max(bisect.bisect_right(steps, level), 1) - 1 for steps in costs]

    def spent(steps: Sequence[int]) -> int:
        return sum(ladder[step] for ladder, step in zip(costs, steps, strict=True))

    levels = sorted({cost for steps in costs for cost in steps})
    fair = bisect.bisect_right(levels, budget, key=lambda level: spent(taken(level))) - 1
    steps = taken(levels[fair]) if fair >= 0 else [0] * len(costs)
    left = budget - spent(steps)
    # What is left over is less than one step for all: one at a time, in order.
    rises = True
    while rises:
        rises = False
        for index, own in enumerate(costs):
            step = steps[index]
            if step + 1 < len(own) and own[step + 1] - own[step] <= left:
                left -= own[step + 1] - own[step]
                steps[index] += 1
                rises = True
    return [views[step] for views, step in zip(ladders, steps, strict=True)]


def _view(part: MediaPart, facts: Sequence[Facts], geometry: VisionGeometry) -> View:
    settings = TileSettings.for_part(geometry, part)
    if isinstance(part.url, tuple):
        most = len(facts) if part.choice is None else part.choice.most
        shown: Sequence[Facts] = [facts[at] for at in segment_middles(0, len(facts) - 1, most)]
    elif isinstance(facts[0], VideoFacts) and part.choice is not None:
        frames = frames_shown(part.choice, facts[0])
        if not frames:
            raise refusal(Reason.OUT_OF_RANGE, part.kind, part.param)
        shown = [facts[0]] * frames
    else:
        shown = facts
    return View(part, tuple(tile_count(one.width, one.height, settings) for one in shown))


def frames_shown(choice: FrameChoice, facts: VideoFacts) -> int:
    """How many frames a choice takes of a video, if they stand at equal distances: what
    ``choose_frames`` does with their times, from what the header says."""
    if choice.start and choice.start >= facts.duration:
        return 0

    def nearest(moment: float) -> int:
        # Averages are not exact: what is a tie must stay one.
        return min(round(round(moment * facts.fps, 6)), facts.frames - 1)

    first = nearest(choice.start or 0)
    last = facts.frames - 1 if choice.end is None else max(nearest(choice.end), first)
    most = min(choice.most, last - first + 1)
    if choice.fps is not None and facts.fps:
        most = min(most, int((last - first + 1) / facts.fps * choice.fps + 1e-6))
    return max(most, 1)


def _fewer(part: MediaPart, frames: int) -> MediaPart:
    """With so many frames at most. A rate would take fewer still: it is part of what was asked."""
    choice = part.choice or FrameChoice(frames)
    fewer = FrameChoice(frames, choice.fps, choice.start, choice.end)
    return dataclasses.replace(part, choice=fewer)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the parts of a request may take. ``room`` prompt tokens leave the answer what it should
    have, ``most_room`` a single token; a frame's label and marks take ``frame`` of them. ``budget``
    is the client's own."""

    geometry: VisionGeometry
    context: int
    room: int
    most_room: int
    frame: int
    budget: VisualBudget | None


class Fitter:
    """Settles how the parts of one request are shown, from what their headers say."""

    def __init__(
        self, parts: Sequence[MediaPart], facts: Sequence[Sequence[Facts]], limits: Limits
    ) -> None:
        self._parts = parts
        self._facts = facts
        self._limits = limits
        self._in_prompt = Price(limits.geometry.tokens_per_tile, limits.frame)

    def asked(self) -> list[View]:
        """What the parts ask for, within the budget. Raises InvalidRequest for one that is too
        small for all of them, and MediaRefused."""
        budget = self._limits.budget
        if budget is None:
            return [views[-1] for views in self._ladders(self._parts, all_give=False)]
        unit = self._limits.geometry.tokens_per_tile
        if budget.max_tiles is not None:
            name, tiles, unit = "max_tiles", budget.max_tiles, 1
        else:
            name, tiles = "max_tokens", (budget.max_tokens or 0) // unit
        views = self.within(tiles)
        if views is None:
            least = sum(view.tiles for view in self.smallest())
            raise InvalidRequest(
                f"visual_budget.{name} must be at least {least * unit} for the pictures and videos "
                "of this request.",
                param=f"visual_budget.{name}",
            )
        return views

    def fitted(self) -> list[View]:
        """The same, made to fit where the parts allow it. Raises InvalidRequest,
        MediaRefused and ContextTooLong."""
        limits = self._limits
        asked = self.asked()
        ladders = self._ladders([view.part for view in asked], all_give=False)
        for room in (limits.room, limits.most_room):
            views = share(ladders, room, self._in_prompt)
            if views is not None:
                return views
        left = max(limits.most_room, 0)
        largest = self.largest_that_fits()
        advice = "They do not fit however small they are shown."
        if largest is not None:
            tiles = sum(view.tiles for view in largest)
            advice = f"With a visual_budget of {tiles} max_tiles they would fit."
        raise ContextTooLong(
            limits.context,
            f"the prompt is too long: its pictures and videos need "
            f"{listed(map(self._in_prompt.of, asked))} tokens, and {left} are left for them. "
            f"{advice}",
            param="messages",
        )

    def smallest(self) -> list[View]:
        """Each part as cheap as it can be shown."""
        return [views[0] for views in self._generous]

    def within(self, tiles: int) -> list[View] | None:
        """No more than so many tiles, shared by all; None if they cannot do with so few."""
        return share(self._generous, tiles, Price(1))

    def largest_that_fits(self) -> list[View] | None:
        """What the largest budget gives with which the request fits; None if there is none."""
        views = share(self._generous, self._limits.most_room, self._in_prompt)
        tiles = 0 if views is None else sum(view.tiles for view in views)
        # A budget is shared without regard to what frames cost besides their tiles: as many tiles
        # may take more of the prompt.
        for most in range(tiles, 0, -1):
            views = self.within(most)
            if views is None or sum(map(self._in_prompt.of, views)) <= self._limits.most_room:
                return views
        return None

    @functools.cached_property
    def _generous(self) -> list[list[View]]:
        """What there is if every part gives up what it must."""
        return self._ladders(self._parts, all_give=True)

    def _ladders(self, parts: Sequence[MediaPart], *, all_give: bool) -> list[list[View]]:
        return [
            ladder(part, known, self._limits.geometry, gives=all_give or part.fit)
            for part, known in zip(parts, self._facts, strict=True)
        ]
