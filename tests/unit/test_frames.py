"""Which frames of a video are shown, against a transcription of the reference."""

import itertools
import random

import numpy as np
import pytest

from preprocessing.frames import choose_frames, segment_middles
from preprocessing.media import FrameChoice


def reference(
    bound: tuple[float, float] | None, fps: float, max_frame: int, num_segments: int
) -> list[int]:
    """``get_index`` as the model's card has it (github.com/OpenGVLab/InternVL)."""
    start, end = (bound[0], bound[1]) if bound else (-100000, 100000)
    start_idx = max(0, round(start * fps))
    end_idx = min(round(end * fps), max_frame)
    seg_size = float(end_idx - start_idx) / num_segments
    frame_indices = np.array(
        [int(start_idx + (seg_size / 2) + np.round(seg_size * idx)) for idx in range(num_segments)]
    )
    return [int(index) for index in frame_indices]


def regular(count: int, fps: float) -> list[float]:
    return [at / fps for at in range(count)]


def test_a_whole_video_is_shown_as_in_the_reference() -> None:
    for count in [*range(1, 70), 1000, 7201, 123_457]:
        seconds = regular(count, 25)
        for most in [*range(1, 34), 128]:
            chosen = choose_frames(seconds, FrameChoice(most), 25)
            if most < count:
                assert chosen == reference(None, 25, count - 1, most), (count, most)
            else:  # there the reference shows some frames twice, and others never
                assert chosen == list(range(count))


@pytest.mark.parametrize("fps", [1, 10, 23.976, 24, 25, 29.97, 30, 59.94, 60, 1000])
def test_a_part_of_a_video_is_shown_as_in_the_reference(fps: float) -> None:
    count = 700
    seconds = regular(count, fps)
    length = count / fps
    draw = random.Random(7)
    # Also those that lie just between two frames; the last is the end.
    bounds = [draw.uniform(0, length) for _ in range(40)] + [0.0, 0.5, 1.5, 2.5, 3.5, length]
    for start, end in itertools.product(bounds, bounds):
        if not start < end <= length:
            continue
        for most in (1, 8, 32):
            chosen = choose_frames(seconds, FrameChoice(most, start=start, end=end), fps)
            first, last = round(start * fps), min(round(end * fps), count - 1)
            if first < count and most <= last - first:
                assert chosen == reference((start, end), fps, count - 1, most), (start, end)
            else:
                assert chosen == list(range(min(first, last), last + 1))[:most]


def test_frames_are_distinct_ascending_and_never_more_than_there_are() -> None:
    for count in range(1, 60):
        for most in range(1, 70):
            chosen = segment_middles(0, count - 1, most)
            assert len(chosen) == min(count, most)
            assert chosen == sorted(set(chosen))
            assert 0 <= chosen[0] <= chosen[-1] < count


@pytest.mark.parametrize(
    ("fps", "start", "end", "expected"),
    [
        (1.0, None, None, 10),
        (2.0, None, None, 20),
        (0.5, None, None, 5),
        (0.01, None, None, 1),  # at least one
        (25.0, None, None, 32),  # at most those allowed
        (1.0, 2.0, 6.0, 4),
        (4.0, 9.0, None, 4),
        (1000.0, 9.9, None, 2),  # and never more than there are
    ],
)
def test_a_rate_says_how_many(
    fps: float, start: float | None, end: float | None, expected: int
) -> None:
    choice = FrameChoice(32, fps=fps, start=start, end=end)
    assert len(choose_frames(regular(250, 25), choice, 25)) == expected


def test_bounds_follow_time_where_the_rate_varies() -> None:
    seconds = [0.0, 0.1, 0.2, 5.0, 5.1, 9.0]
    fps = 5 / 9
    assert choose_frames(seconds, FrameChoice(9, start=0.15, end=5.04), fps) == [2, 3]
    assert choose_frames(seconds, FrameChoice(9, start=4.0), fps) == [3, 4, 5]
    assert choose_frames(seconds, FrameChoice(9, end=1.0), fps) == [0, 1, 2]
    assert choose_frames(seconds, FrameChoice(1, start=9.5), fps) == [5]


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (10.0, None), (10.0, 20.0), (1e300, None), (float("inf"), None), (3.0, 3.0), (3.0, 2.0),
        (None, 0.0), (None, -1.0), (float("nan"), None), (None, float("nan")), (0.0, 0.0),
    ],
)  # fmt: skip
def test_no_frame_is_outside_of_a_video(start: float | None, end: float | None) -> None:
    assert choose_frames(regular(250, 25), FrameChoice(8, start=start, end=end), 25) == []


@pytest.mark.parametrize("end", [10.0, 11.0, 1e300, float("inf")])
def test_an_end_behind_the_last_frame_is_the_last_frame(end: float) -> None:
    assert choose_frames(regular(250, 25), FrameChoice(300, end=end), 25) == list(range(250))


def test_frames_shown_at_one_time_are_all_counted() -> None:
    seconds = [0.0, 0.0, 0.0]
    assert choose_frames(seconds, FrameChoice(9), 0.0) == [0, 1, 2]
    assert choose_frames([0.0], FrameChoice(9, fps=5.0), 0.0) == [0]
    assert choose_frames([0.0], FrameChoice(9, end=5.0), 0.0) == [0]
    assert choose_frames([0.0], FrameChoice(9, start=5.0), 0.0) == []
