"""Which frames of a video are shown. Pure."""

import bisect
from collections.abc import Sequence

from preprocessing.media import FrameChoice


def segment_middles(first: int, last: int, count: int) -> list[int]:
    """``count`` numbers from ``first`` to ``last``: the middles of equal segments.

    The formula is the reference's (``get_index`` of InternVL's ``load_video``), which repeats
    frames where there are fewer than asked for; here all of them are shown once.
    """
    if count > last - first:
        return list(range(first, last + 1))
    segment = (last - first) / count
    return [int(first + segment / 2 + round(segment * k)) for k in range(count)]


def choose_frames(seconds: Sequence[float], choice: FrameChoice, fps: float) -> list[int]:
    """The numbers of the frames to show; none if the video has none between the bounds.

    ``seconds`` are the times of all frames, ascending from 0, and ``fps`` their average rate, 0
    for a single frame. The bounds of ``choice`` lead to the frames nearest in time: at a
    constant rate to ``round(start * fps)`` and ``round(end * fps)``, as in the reference.
    """
    last = len(seconds) - 1
    length = seconds[last] + (1 / fps if fps else 0.0)
    start = max(choice.start or 0.0, 0.0)
    if (start and not start < length) or (choice.end is not None and not start < choice.end):
        return []
    first, final = _nearest(seconds, start, fps) if start else 0, last
    if choice.end is not None and choice.end < length:
        final = max(_nearest(seconds, choice.end, fps), first)
    most = min(choice.most, final - first + 1)
    if choice.fps is not None and fps:
        span = seconds[final] - seconds[first] + 1 / fps
        most = max(1, int(min(most, span * choice.fps + 1e-6)))
    return segment_middles(first, final, most)


def _nearest(seconds: Sequence[float], moment: float, fps: float) -> int:
    """The number of the frame nearest in time; of two equally near the even one."""
    last = len(seconds) - 1
    before = bisect.bisect_right(seconds, moment) - 1
    if before >= last:
        place = last + (moment - seconds[last]) * fps
    else:
        gap = seconds[before + 1] - seconds[before]
        place = before + (moment - seconds[before]) / gap
    # Seconds are rounded: what is a tie must stay one.
    return min(round(round(place, 6)), last)
