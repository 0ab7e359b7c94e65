"""How a budget is shared among pictures and videos, and the ladders of views it is shared along."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing import FrameChoice, MediaPart
from preprocessing.frames import choose_frames, segment_middles
from preprocessing.grid import tile_count
from preprocessing.media import Facts, PictureFacts, TileSettings, VideoFacts
from server.chat.prompt import PromptBuilder, Turn, Video
from server.chat.showing import Canvas
from server.chat.visual import (
    Fitter,
    Limits,
    Price,
    View,
    frames_shown,
    ladder,
    most_tiles,
    share,
)
from server.schemas.chat import VisualBudget
from server.tokenizer import Tokenizer
from tests.fake_engine import make_ready
from tests.small_tokenizer import encode_rendered, tokenizer_json
from wire.errors import ContextTooLong, InvalidRequest, MediaRefused
from wire.geometry import VisionGeometry

TOKENIZER = Tokenizer(json.loads(tokenizer_json()))
GEOMETRY = VisionGeometry(tile_size=448, tokens_per_tile=256)
FRAME = 9


def picture(
    width: int = 640, height: int = 480, **bounds: object
) -> tuple[MediaPart, tuple[Facts, ...]]:
    part = MediaPart("data:", "picture", **bounds)  # type: ignore[arg-type]
    return part, (PictureFacts("PNG", width, height),)


def video(
    frames: int = 300, most: int = 32, **bounds: object
) -> tuple[MediaPart, tuple[Facts, ...]]:
    choice = FrameChoice(most)
    part = MediaPart("data:", "video", kind="video", choice=choice, **bounds)  # type: ignore[arg-type]
    facts = VideoFacts("mp4", "h264", 1280, 720, 0, frames, duration=frames / 30, fps=30.0)
    return part, (facts,)


def fitter(
    *asked: tuple[MediaPart, tuple[Facts, ...]],
    room: int = 30_000,
    budget: VisualBudget | None = None,
    frame: int = FRAME,
) -> Fitter:
    limits = Limits(GEOMETRY, 32_768, room - 256, room - 1, frame, budget)
    return Fitter([part for part, _ in asked], [facts for _, facts in asked], limits)


def tiles(views: list[View]) -> list[int]:
    return [view.tiles for view in views]


# ladders


def test_a_ladder_ends_with_what_is_asked_and_each_step_is_cheaper() -> None:
    part, facts = picture()
    views = ladder(part, facts, GEOMETRY, gives=True)
    assert views[-1].part == part
    assert tiles(views) == sorted(set(tiles(views)))
    assert tiles(views)[0] == 1
    assert tiles(views)[-1] == 13
    for view in views:
        settings = TileSettings.for_part(GEOMETRY, view.part)
        assert view.shots == (tile_count(640, 480, settings),)


def test_a_part_that_does_not_give_has_one_view() -> None:
    part, facts = picture()
    assert ladder(part, facts, GEOMETRY, gives=False) == [View(part, (13,))]


def test_a_ladder_never_goes_below_the_least_that_is_asked() -> None:
    part, facts = picture(min_tiles=4)
    settings = TileSettings.for_part(GEOMETRY, ladder(part, facts, GEOMETRY, gives=True)[0].part)
    assert settings.min_tiles == 4


def test_a_video_gives_frames_first_and_then_tiles() -> None:
    part, facts = video(most=3, max_tiles=4)
    views = ladder(part, facts, GEOMETRY, gives=True)
    full = tile_count(1280, 720, TileSettings.for_part(GEOMETRY, part))
    assert full > 1
    assert [view.shots for view in views][-3:] == [(full,), (full,) * 2, (full,) * 3]
    assert all(len(view.shots) == 1 for view in views[:-3])
    assert views[0].shots == (1,)


def test_a_video_given_as_pictures_counts_those_that_are_shown() -> None:
    sizes = [(448, 448), (896, 448), (448, 448), (100, 1200), (448, 448)]
    facts = tuple(PictureFacts("PNG", *size) for size in sizes)
    urls = ("data:",) * 5
    part = MediaPart(urls, "v", kind="video", max_tiles=12, choice=FrameChoice(5))
    (wanted,) = ladder(part, facts, GEOMETRY, gives=False)
    views = ladder(part, facts, GEOMETRY, gives=True)
    assert views[-1] == wanted
    assert all(view.tiles < wanted.tiles for view in views[:-1])
    for view in views:
        assert view.part.choice is not None
        settings = TileSettings.for_part(GEOMETRY, view.part)
        shown = segment_middles(0, 4, view.part.choice.most)
        assert view.shots == tuple(tile_count(*sizes[at], settings) for at in shown)


@pytest.mark.parametrize(
    ("choice", "frames"),
    [
        (FrameChoice(32), 32),
        (FrameChoice(400), 300),
        (FrameChoice(64, fps=2.0), 20),
        (FrameChoice(8, fps=2.0), 8),
        (FrameChoice(64, fps=2.0, start=4.0), 12),
        (FrameChoice(64, fps=2.0, start=4.0, end=6.0), 4),
        (FrameChoice(64, fps=0.01), 1),
        (FrameChoice(64, fps=2.0, end=5.98), 12),
        (FrameChoice(400, start=1.0, end=2.0), 31),
        (FrameChoice(400, start=1.01, end=1.99), 31),
        (FrameChoice(400, start=9.99), 1),
    ],
)
def test_the_frames_of_a_video_are_known_from_its_header(choice: FrameChoice, frames: int) -> None:
    part, facts = video()
    assert len(choose_frames([at / 30 for at in range(300)], choice, 30.0)) == frames
    part = dataclasses.replace(part, choice=choice)
    (view,) = ladder(part, facts, GEOMETRY, gives=False)
    assert len(view.shots) == frames


def test_a_tie_is_one_where_the_average_rate_is_not_exact() -> None:
    """0.5 s of 25 frames a second lies between frames 12 and 13, as the decoder finds too."""
    fps = 25.000000000000004
    facts = VideoFacts("mp4", "h264", 64, 64, 0, frames=30, duration=1.2, fps=fps)
    choice = FrameChoice(32, start=0.5, end=0.6)
    assert len(choose_frames([at / 25 for at in range(30)], choice, fps)) == 4
    assert frames_shown(choice, facts) == 4


def test_a_video_without_frames_in_the_time_asked_for_is_refused() -> None:
    part, facts = video()
    part = dataclasses.replace(part, choice=FrameChoice(32, start=10.0))
    assert choose_frames([at / 30 for at in range(300)], FrameChoice(32, start=10.0), 30.0) == []
    with pytest.raises(MediaRefused, match="'start' and 'end'"):
        ladder(part, facts, GEOMETRY, gives=True)


@pytest.mark.parametrize("choice", [FrameChoice(32, end=1.0), FrameChoice(32, fps=1.0)])
def test_a_part_of_a_video_is_held_to_the_frames_that_were_counted(choice: FrameChoice) -> None:
    part, facts = video()
    part = dataclasses.replace(part, choice=choice)
    (view,) = ladder(part, facts, GEOMETRY, gives=False)
    assert view.held.choice is not None
    assert len(view.shots) == view.held.choice.most < 32
    # All of them at once, which their header could not tell.
    assert len(choose_frames([0.0] * 299 + [10.0], view.held.choice, 30.0)) <= len(view.shots)


def test_a_whole_video_stays_as_it_was_asked_for() -> None:
    """What is cached of it is found again."""
    part, facts = video(frames=8)
    (view,) = ladder(part, facts, GEOMETRY, gives=False)
    assert view.held is part


def test_fewer_pictures_are_no_gain_if_they_have_more_tiles() -> None:
    """Of five pictures two are shown, 1 and 3; alone it would be the large one in the middle."""
    facts = tuple(PictureFacts("PNG", 640 if at == 2 else 448, 448) for at in range(5))
    part = MediaPart(("data:",) * 5, "v", kind="video", max_tiles=12, choice=FrameChoice(2))
    views = ladder(part, facts, GEOMETRY, gives=True)
    assert tiles(views)[-1] == 2
    assert views[-1].part == part


# shares


def test_equal_pictures_get_equal_shares_and_the_first_what_is_left() -> None:
    views = fitter(*[picture()] * 4, budget=VisualBudget(max_tiles=23)).asked()
    part, facts = picture()
    steps = tiles(ladder(part, facts, GEOMETRY, gives=True))
    low, high = sorted(set(tiles(views)))
    assert steps.index(high) == steps.index(low) + 1
    assert tiles(views) == sorted(tiles(views), reverse=True)


def test_who_wants_little_leaves_the_rest_to_others() -> None:
    views = fitter(picture(448, 448), picture(), budget=VisualBudget(max_tiles=14)).asked()
    assert tiles(views) == [1, 13]


def test_a_budget_in_tokens_is_one_in_tiles() -> None:
    asked = [picture(), picture(), video()]
    in_tiles = fitter(*asked, budget=VisualBudget(max_tiles=30)).asked()
    in_tokens = fitter(*asked, budget=VisualBudget(max_tokens=30 * 256 + 255)).asked()
    assert in_tiles == in_tokens


def test_a_budget_too_small_for_all_says_how_large_it_must_be() -> None:
    asked = [picture(min_tiles=2), picture(), video()]
    with pytest.raises(InvalidRequest, match="at least 5") as refused:
        fitter(*asked, budget=VisualBudget(max_tiles=4)).asked()
    assert refused.value.param == "visual_budget.max_tiles"
    with pytest.raises(InvalidRequest, match=r"max_tokens must be at least 1280 "):
        fitter(*asked, budget=VisualBudget(max_tokens=1279)).asked()
    assert sum(tiles(fitter(*asked, budget=VisualBudget(max_tiles=5)).asked())) == 5


def test_frames_are_given_up_to_fit_and_pictures_are_not_unless_they_may_be() -> None:
    room = 13 * 256 + 10 * (256 + FRAME) + 300
    views = fitter(picture(), video(fit=True), room=room).fitted()
    assert tiles(views) == [13, 10]
    first, second = fitter(picture(fit=True), video(fit=True), room=room).fitted()
    assert first.tiles < 13
    assert 10 < second.tiles < 32


@pytest.mark.parametrize("answer", [None, 5])
def test_what_is_made_to_fit_fits_however_its_text_is_cut(answer: int | None) -> None:
    """Without a frame in between it would be fewer tokens."""
    before, after = "由上海", "人工智能实验室"
    apart = len(encode_rendered(before)) + len(encode_rendered(after))
    assert len(encode_rendered(before + after)) < apart
    part, facts = video(most=9, fit=True)
    shown = set()
    for context in range(36, 150):
        ready = make_ready(max_model_len=context)
        prompts = PromptBuilder(TOKENIZER, ready.prompt_format, 3, context)
        segments = prompts.render([Turn("user", (before, Video(0), after))], 0)
        canvas = Canvas(prompts, segments, ready, None, answer)
        views = Fitter([part], [facts], canvas.limits([part])).fitted()
        shown.add(views[0].shots)
        assert canvas.length(views) + (answer or 1) <= context
    assert len(shown) == 9


def test_an_answer_may_go_short_before_anything_is_refused() -> None:
    """What is kept for the answer is a wish: the last frame comes first."""
    views = fitter(video(fit=True), room=256 + FRAME + 1).fitted()
    assert tiles(views) == [1]
    with pytest.raises(ContextTooLong):
        fitter(video(fit=True), room=256 + FRAME).fitted()


def test_a_video_that_may_not_be_cut_is_refused() -> None:
    with pytest.raises(ContextTooLong):
        fitter(video(), room=5000).fitted()


part_strategy = st.one_of(
    st.builds(
        lambda w, h, least, most, fit: picture(
            w, h, min_tiles=min(least, most), max_tiles=most, fit=fit
        ),
        st.integers(1, 3000),
        st.integers(1, 3000),
        st.integers(1, 12),
        st.integers(1, 12),
        st.booleans(),
    ),
    st.builds(
        lambda frames, most, tiles, fit: video(frames, most, max_tiles=tiles, fit=fit),
        st.integers(1, 200),
        st.integers(1, 40),
        st.none() | st.integers(1, 6),
        st.booleans(),
    ),
)


@given(st.lists(part_strategy, min_size=1, max_size=6), st.integers(1, 120))
def test_shares_are_within_the_budget_fair_and_leave_nothing_that_somebody_could_use(
    asked: list[tuple[MediaPart, tuple[Facts, ...]]], budget: int
) -> None:
    ladders = [ladder(part, facts, GEOMETRY, gives=True) for part, facts in asked]
    views = share(ladders, budget, Price(1))
    if views is None:
        assert sum(steps[0].tiles for steps in ladders) > budget
        return
    assert sum(tiles(views)) <= budget
    left = budget - sum(tiles(views))

    def level(most: int) -> list[int]:
        """What each can have that takes no more than ``most``."""
        return [
            max((step.tiles for step in steps if step.tiles <= most), default=steps[0].tiles)
            for steps in ladders
        ]

    fair = level(max(most for most in range(budget + 1) if sum(level(most)) <= budget))
    for view, steps, least in zip(views, ladders, fair, strict=True):
        assert view in steps
        assert view.tiles >= least
        more = [step.tiles - view.tiles for step in steps if step.tiles > view.tiles]
        assert not more or min(more) > left


@given(st.lists(part_strategy, min_size=1, max_size=5), st.integers(300, 20_000))
def test_what_is_fitted_fits_and_only_who_may_gives(
    asked: list[tuple[MediaPart, tuple[Facts, ...]]], room: int
) -> None:
    subject = fitter(*asked, room=room)
    price = Price(256, FRAME)
    wanted = subject.asked()
    try:
        views = subject.fitted()
    except ContextTooLong:
        least = [
            price.of(small if part.fit else want)
            for small, want, (part, _) in zip(subject.smallest(), wanted, asked, strict=True)
        ]
        assert sum(least) > room - 1
        return
    assert sum(map(price.of, views)) <= room - 1
    for view, want, (part, _) in zip(views, wanted, asked, strict=True):
        assert view.part == part or part.fit
        assert view.tiles <= want.tiles
    if sum(map(price.of, wanted)) <= room - 256:
        assert views == wanted


def test_the_largest_budget_minds_what_frames_cost_besides_their_tiles() -> None:
    """Shared by tiles alone, 18 tiles would be ten frames, which do not fit."""
    subject = fitter(video(), picture(1616, 430), picture(1335, 778), room=7591, frame=400)
    views = subject.largest_that_fits()
    assert views is not None
    assert sum(map(Price(256, 400).of, views)) <= 7590
    assert subject.within(sum(tiles(views))) == views


@given(
    st.lists(part_strategy, min_size=1, max_size=5),
    st.integers(300, 20_000),
    st.sampled_from([FRAME, 400]),
)
def test_the_largest_budget_that_fits_does_and_the_bound_without_headers_holds(
    asked: list[tuple[MediaPart, tuple[Facts, ...]]], room: int, frame: int
) -> None:
    subject = fitter(*asked, room=room, frame=frame)
    price = Price(256, frame)
    views = subject.largest_that_fits()
    if views is None:
        assert sum(map(price.of, subject.smallest())) > room - 1
    else:
        assert sum(map(price.of, views)) <= room - 1
        assert subject.within(sum(tiles(views))) == views
    for view, (part, _) in zip(subject.asked(), asked, strict=True):
        assert view.tiles <= most_tiles(part, GEOMETRY)
