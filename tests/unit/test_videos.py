"""What is decoded for the frames that are chosen."""

import pytest

from preprocessing.containers import Timeline
from preprocessing.videos import _runs


def timeline(times: list[int], keys: list[int], is_ordered: bool = True) -> Timeline:
    """Packets at ``times``, in the order they are stored; ``keys`` are numbers of packets."""
    shown = sorted((time, packet) for packet, time in enumerate(times))
    return Timeline(
        packets=[packet for _, packet in shown],
        times=[time for time, _ in shown],
        seconds=[float(time) for time, _ in shown],
        keys=[(packet, times[packet]) for packet in keys],
        is_ordered=is_ordered,
        fps=1.0,
        duration=float(len(times)),
    )


# Two groups of pictures; 4 and 5 are stored behind the second key frame and shown before it.
OPEN = timeline([0, 3, 1, 2, 6, 4, 5, 9, 7, 8], keys=[0, 4])
CLOSED = timeline([0, 1, 2, 3, 4, 5, 6, 7, 8], keys=[0, 3, 6])


@pytest.mark.parametrize(
    ("video", "chosen", "expected"),
    [
        (CLOSED, [0], [(0, 0)]),
        (CLOSED, [2], [(0, 2)]),
        (CLOSED, [1, 7], [(0, 1), (6, 7)]),
        (CLOSED, [1, 4, 7], [(0, 1), (3, 4), (6, 7)]),
        (CLOSED, [2, 4], [(0, 4)]),  # the second begins where the first ends
        (CLOSED, [3, 5], [(3, 5)]),
        (OPEN, [6], [(4, 4)]),
        (OPEN, [8], [(4, 9)]),
        (OPEN, [5], [(0, 6)]),  # needs frames of both groups
        (OPEN, [5, 7], [(0, 8)]),
        (OPEN, [1, 7], [(0, 2), (4, 8)]),
    ],
)
def test_decoding_begins_at_the_last_key_frame_that_a_frame_needs(
    video: Timeline, chosen: list[int], expected: list[tuple[int, int]]
) -> None:
    runs = _runs(video, chosen)
    assert [(run.first, run.last) for run in runs] == expected
    assert [frame for run in runs for frame in run.chosen] == chosen


def test_without_an_order_everything_is_decoded() -> None:
    (run,) = _runs(timeline([0, 3, 1, 2], [0, 2], is_ordered=False), [1, 3])
    assert (run.first, run.last, run.chosen) == (0, float("inf"), [1, 3])


def test_without_key_frames_decoding_begins_at_the_beginning() -> None:
    (run,) = _runs(timeline([0, 1, 2, 3], []), [2])
    assert (run.first, run.last) == (0, 2)
