"""The prefix cache: what names a block, who finds it, and what a hit saves."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BlockPool
from engine.prefix import GRAIN, Part, Parts, count_common, extend_digests, part_of
from tests.fake_runner import GEOMETRY, Engine, alone, request
from wire.messages import EngineStats, StepReport, VisionItem

SIZE = 4


def names(
    tokens: Sequence[int], items: Sequence[VisionItem] = (), salt: bytes = b"", size: int = SIZE
) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, tokens, items, size, salt)
    return digests


def picture(offset: int, digest: bytes = b"p", length: int = 4) -> VisionItem:
    return VisionItem(digest, offset, length, length // 4, 0)


# Names


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.data())
def test_a_changed_token_renames_its_block_and_all_later_ones(
    tokens: list[int], data: st.DataObject
) -> None:
    before = names(tokens)
    assert len(before) == len(tokens) // SIZE == len(set(before))
    if not before:
        return
    place = data.draw(st.integers(0, len(before) * SIZE - 1))
    changed = [*tokens[:place], tokens[place] ^ 1, *tokens[place + 1 :]]
    after = names(changed)
    same = place // SIZE
    assert after[:same] == before[:same]
    assert not set(after[same:]) & set(before)


def test_names_grow_with_the_sequence() -> None:
    tokens = list(range(20))
    digests: list[bytes] = []
    for length in range(21):
        extend_digests(digests, tokens[:length], [picture(6)], SIZE, b"s")
    assert digests == names(tokens, [picture(6)], b"s")


def test_pictures_name_the_blocks_they_touch_by_content_and_place() -> None:
    tokens = [9] * 16
    plain = names(tokens)
    one = names(tokens, [picture(6)])
    assert one[0] == plain[0]
    assert not set(one[1:]) & set(plain)
    for other in (
        [picture(6, b"q")],
        [picture(5)],
        [picture(7)],
        [picture(6, length=8)],
        [picture(6, b"p", 2), picture(8, b"p", 2)],
    ):
        assert names(tokens, other)[0] == plain[0]
        assert names(tokens, other)[3] != one[3]


def test_salts_share_nothing() -> None:
    tokens = [1] * 12
    assert not set(names(tokens, salt=b"a")) & (set(names(tokens)) | set(names(tokens, salt=b"b")))


# Blocks


def test_a_free_block_is_found_until_it_is_handed_out_again() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[0], b"x")
    pool.free(blocks)
    assert pool.match([b"x", b"y"]) == [blocks[0]]
    pool.share(pool.match([b"x"]))
    assert pool.num_free == 2
    assert pool.allocate(3) is None
    pool.free([blocks[0]])
    assert pool.allocate(3) is not None
    assert pool.match([b"x"]) == []
    pool.check()


def test_of_two_equal_blocks_the_first_is_found_and_outlives_the_second() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    pool.publish(first[0], b"x")
    pool.publish(second[0], b"x")
    pool.free(second)
    assert pool.allocate(3) is not None
    assert pool.match([b"x"]) == first
    pool.check()


def test_a_match_ends_at_the_first_gap() -> None:
    pool = BlockPool(3)
    a, _, c = pool.allocate(3) or []
    pool.publish(a, b"a")
    pool.publish(c, b"c")
    assert pool.match([b"a", b"b", b"c"]) == [a]


# Parts of blocks

TOKENS = st.lists(st.integers(0, 2), max_size=4 * GRAIN)
SHOWN = st.lists(
    st.tuples(
        st.integers(-9, 30),
        st.sampled_from([b"p", b"q"]),
        st.sampled_from([1.0, 0.5]),
        st.integers(1, 19),
    ),
    max_size=3,
    unique_by=lambda item: item[0],
).map(sorted)


def part(tokens: Sequence[int], *items: VisionItem, start: int = 0) -> Part:
    return part_of([0] * start + [*tokens], items, start, start + len(tokens))


@given(TOKENS, TOKENS, SHOWN, SHOWN)
def test_two_parts_have_in_common_what_no_position_before_contradicts(
    one: list[int],
    other: list[int],
    shown: list[tuple[int, bytes, float, int]],
    also: list[tuple[int, bytes, float, int]],
) -> None:
    pairs = [Part(part(tokens).tokens, tuple(i)) for tokens, i in ((one, shown), (other, also))]
    both = set(shown) & set(also)
    places = {place for place, *_ in {*shown, *also} - both}
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        if any(place <= same for place in places):
            break
        same += 1
    before = (item for item in both if all(item[0] < place for place in places))
    ends = [place + length for place, _, _, length in before if place + length <= same]
    found = max([same // GRAIN * GRAIN, *ends])
    assert count_common(*pairs) == count_common(*reversed(pairs)) == found


def test_the_block_with_the_most_in_common_is_found() -> None:
    parts, tokens = Parts(), list(range(4 * GRAIN))
    parts.note(7, b"a", part([*tokens[:GRAIN], *[99] * GRAIN]))
    parts.note(8, b"a", part(tokens[: 3 * GRAIN]))
    parts.note(9, b"b", part(tokens))
    assert parts.find(b"a", part(tokens)) == (8, 3 * GRAIN)
    assert parts.find(b"a", part([*tokens[: 2 * GRAIN], 99])) == (8, 2 * GRAIN)
    assert parts.find(b"a", part([99] * GRAIN))[1] == 0
    assert parts.find(b"c", part(tokens))[1] == 0
    parts.forget(8)
    assert parts.find(b"a", part(tokens)) == (7, GRAIN)
    parts.forget_behind(b"a")
    assert parts.blocks == {9}
    parts.check()


def test_equal_parts_are_known_once_and_the_last_one_is_found() -> None:
    parts, tokens = Parts(), range(GRAIN)
    for block in (1, 2):
        parts.note(block, b"a", part(tokens))
    assert parts.blocks == {2}
    parts.note(2, b"b", part(tokens))
    assert parts.find(b"a", part(tokens))[1] == 0
    parts.check()


def test_of_many_parts_behind_one_block_the_oldest_are_forgotten() -> None:
    parts = Parts()
    for block in range(1000):
        parts.note(block, b"a", part([block] * GRAIN))
        parts.check()
    assert parts.find(b"a", part([999] * GRAIN)) == (999, GRAIN)
    assert parts.find(b"a", part([0] * GRAIN))[1] == 0
    assert len(parts.blocks) < 100


def test_a_noted_block_is_found_until_it_is_handed_out_again() -> None:
    pool, tokens = BlockPool(2), part(range(GRAIN))
    blocks = pool.allocate(1) or []
    pool.note(blocks[0], b"a", tokens)
    pool.free(blocks)
    assert pool.find_part(b"a", tokens) == (blocks[0], GRAIN)
    assert pool.allocate(2) is not None
    assert pool.find_part(b"a", tokens)[1] == 0
    pool.check()


# Sequences


def test_the_same_prompt_is_computed_once_but_for_its_last_block() -> None:
    engine = Engine()
    engine.add("a", 22, max_tokens=3)
    engine.finish()
    engine.add("b", 22, max_tokens=3)
    (work,) = engine.step().work
    assert (work.start, work.count) == (20, 2)
    engine.finish()
    assert engine.tokens["b"] == engine.tokens["a"] == alone(22, max_tokens=3)
    assert engine.ends["a"].cached_tokens == 0
    assert engine.ends["b"].cached_tokens == 20
    assert engine.scheduler.stats.cached_tokens == 20


def test_a_hit_never_covers_the_last_token() -> None:
    engine = Engine()
    engine.add("a", 8, max_tokens=8)
    engine.finish()
    engine.add("b", 8, max_tokens=8)
    (work,) = engine.step().work
    assert (work.start, work.count, work.sample) == (4, 4, True)
    engine.finish()
    assert engine.tokens["b"] == engine.tokens["a"]


def test_the_blocks_of_a_failed_row_are_found_by_nobody() -> None:
    """What made its logits wrong may stand in them, also in the chunks before."""
    prompt = [7 * n % 90 for n in range(19)]
    engine = Engine(max_num_batched_tokens=8, bad_after=frozenset({prompt[-1]}))
    engine.add_tokens("bad", prompt, max_tokens=2)
    engine.finish()
    assert engine.ends["bad"].finish_reason == "error"
    engine.add_tokens("next", [*prompt, 1], max_tokens=2)
    assert engine.step().work[0].start == 0


def test_no_block_of_two_failed_rows_is_found_when_their_beginning_is_computed_again() -> None:
    """The first to fail takes their beginning along; what the second had behind it must go too."""
    bad, start = 90, [*range(8)]
    first, second = ([*start, number, number, number, number, bad] for number in (20, 30))
    engine = Engine(bad_after=frozenset({bad}))
    engine.add_tokens("start", [*start, 1], max_tokens=1)
    engine.finish()
    engine.add_tokens("first", first, max_tokens=2)
    engine.add_tokens("second", second, max_tokens=2)
    engine.finish()
    assert engine.ends["first"].error
    assert engine.ends["second"].error
    engine.add_tokens("start again", [*start, 1], max_tokens=1)
    engine.finish()
    engine.add_tokens("next", [*second, 1], max_tokens=2)
    assert engine.step().work[0].start == len(start)


def test_only_prompt_tokens_count_as_cached_when_a_request_is_resumed() -> None:
    engine = Engine()
    for name in "ab":
        first, buffers = request(name, 6, max_tokens=30)
        resumed = msgspec.structs.replace(first, output=[n % 90 for n in range(20)])
        engine.core.add(resumed, buffers)
        engine.finish()
    assert engine.ends["b"].cached_tokens == 6


def test_sequences_that_run_share_their_beginning() -> None:
    engine = Engine(num_kv_blocks=9)
    engine.add("a", 21, max_tokens=10)
    engine.step()
    assert engine.scheduler.stats.blocks_used == 6
    engine.add("b", 21, max_tokens=2)
    engine.step()
    assert engine.scheduler.stats.blocks_used == 7
    engine.finish()
    assert engine.tokens["b"] == engine.tokens["a"][:2]


@pytest.mark.parametrize("pipelined", ["off", "on"])
def test_sequences_that_start_together_compute_their_beginning_once(pipelined: str) -> None:
    engine = Engine(async_scheduling=pipelined)
    for name in "abc":
        engine.add(name, 5, (1, 2), 9, max_tokens=3)
    plan = engine.step()
    assert [(work.start, work.count) for work in plan.work] == [(0, 22), (20, 2), (20, 2)]
    assert sum(item.tiles for item in plan.encode) == 2
    engine.finish()
    for name in "abc":
        assert engine.tokens[name] == alone(5, (1, 2), 9, max_tokens=3)
    assert [engine.ends[name].cached_tokens for name in "abc"] == [0, 20, 20]


def test_one_that_starts_shares_what_a_step_computes_of_another_s_chunk() -> None:
    engine = Engine(max_num_batched_tokens=12)
    engine.add("a", 30, max_tokens=3)
    engine.step()
    engine.add("b", 18, 5, max_tokens=3, seed=1)
    engine.add("c", 30, max_tokens=3)
    while "c" not in engine.tokens:
        engine.step()
    engine.finish()
    assert engine.tokens["c"] == engine.tokens["a"] == alone(30, max_tokens=3)
    assert engine.tokens["b"] == alone(18, 5, max_tokens=3, seed=1)
    assert engine.ends["c"].cached_tokens == 28


def test_who_shares_what_an_aborted_sequence_was_to_compute_gets_it() -> None:
    """The step is executed, whoever leaves meanwhile."""
    engine = Engine()
    for name in "ab":
        engine.add(name, 22, max_tokens=3)
    plan = engine.scheduler.plan()
    assert plan is not None
    assert plan.work[1].start == 20
    engine.core.abort(["a"])
    engine.take(StepReport(engine.scheduler.commit(engine.runner.execute(plan)), EngineStats()))
    engine.finish()
    assert engine.tokens["b"] == alone(22, max_tokens=3)


def test_of_a_block_that_is_being_computed_no_part_is_copied() -> None:
    """A step copies first; in the next one it may be."""
    common = [n % 90 for n in range(2 * GRAIN)]
    engine = Engine(block_size=4 * GRAIN, max_num_batched_tokens=256)
    for name, last in (("a", 91), ("b", 92), ("c", 93)):
        engine.add_tokens(name, [*common, *[last] * (2 * GRAIN + 1)], max_tokens=3)
    assert [work.start for work in engine.step().work] == [0, 0, 0]
    engine.finish()
    fresh = Engine(enable_prefix_caching=False)
    fresh.add_tokens("b", [*common, *[92] * (2 * GRAIN + 1)], max_tokens=3)
    fresh.finish()
    assert engine.tokens["b"] == fresh.tokens["b"]


def test_what_was_generated_is_found_too() -> None:
    """The next turn of a conversation starts where the last one ended."""
    engine = Engine()
    engine.add("a", 10, max_tokens=9)
    engine.finish()
    first = engine.runner.plans[0].new_rows[0].token_ids
    engine.add_tokens("b", [*first, *engine.tokens["a"], 1, 2, 3], max_tokens=2)
    (work,) = engine.step().work
    # 19 tokens are known; the last of them was never computed.
    assert work.start == 16


def test_a_picture_in_the_prefix_is_not_encoded_again() -> None:
    tile = GEOMETRY.tokens_per_tile * 10
    engine = Engine(encoder_cache_bytes=2 * tile)
    engine.add("a", 3, (1, 2), 5, max_tokens=2)
    engine.finish()
    engine.add("other", 3, (2, 2), 5, max_tokens=2)
    engine.finish()
    engine.add("b", 3, (1, 2), 9, max_tokens=2)
    plan = engine.step()
    assert not plan.encode
    assert plan.work[0].start == 16
    engine.finish()
    assert engine.tokens["b"] == alone(3, (1, 2), 9, max_tokens=2)
    assert engine.tokens["other"] == alone(3, (2, 2), 5, max_tokens=2)


def test_a_hit_may_end_inside_a_picture() -> None:
    engine = Engine()
    engine.add("a", 2, (1, 2), max_tokens=1)
    engine.finish()
    engine.add("b", 2, (1, 2), 7, max_tokens=3)
    (work,) = engine.step().work
    assert work.start == 8
    engine.finish()
    assert engine.tokens["b"] == alone(2, (1, 2), 7, max_tokens=3)


def test_other_pictures_in_the_same_place_are_other_prefixes() -> None:
    engine = Engine()
    for name, seed in (("a", 1), ("b", 2)):
        engine.add(name, 4, (seed, 1), 5, max_tokens=3)
        engine.finish()
        assert engine.tokens[name] == alone(4, (seed, 1), 5, max_tokens=3)
    assert engine.ends["b"].cached_tokens == 4


def test_salted_requests_do_not_meet() -> None:
    engine = Engine()
    for name, salt in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        engine.add(name, 9, max_tokens=1, salt=salt)
        engine.finish()
    assert [engine.ends[name].cached_tokens for name in "abc"] == [0, 0, 8]


def test_old_prefixes_give_way_to_new_ones_tail_first() -> None:
    engine = Engine(num_kv_blocks=6)
    for name, seed in (("a", 0), ("b", 1), ("c", 0), ("d", 1)):
        engine.add(name, 17, max_tokens=1, seed=seed)
        engine.finish()
    assert [engine.ends[name].cached_tokens for name in "abcd"] == [0, 0, 4, 4]
    engine.add("e", 17, max_tokens=1, seed=1)
    engine.finish()
    assert engine.ends["e"].cached_tokens == 16


@pytest.mark.parametrize("budget", [1, 3, 64])
def test_without_the_cache_everything_is_computed(budget: int) -> None:
    engine = Engine(enable_prefix_caching=False, max_num_batched_tokens=budget)
    for name in "ab":
        engine.add(name, 9, (1, 1), 5, max_tokens=3)
        engine.finish()
    assert engine.ends["b"].cached_tokens == 0
    assert engine.tokens["b"] == engine.tokens["a"] == alone(9, (1, 1), 5, max_tokens=3)


# Sequences that go on from a part of a block

BLOCK = 4 * GRAIN


def test_the_same_prompt_is_computed_again_from_its_last_grain_on() -> None:
    engine = Engine(block_size=BLOCK)
    engine.add("a", BLOCK + 2 * GRAIN + 3, max_tokens=3)
    engine.finish()
    engine.add("b", BLOCK + 2 * GRAIN + 3, max_tokens=3)
    plan = engine.step()
    assert [(work.start, work.count) for work in plan.work] == [(BLOCK + 2 * GRAIN, 3)]
    engine.finish()
    assert engine.tokens["b"] == engine.tokens["a"] == alone(BLOCK + 2 * GRAIN + 3, max_tokens=3)
    assert engine.ends["b"].cached_tokens == BLOCK + 2 * GRAIN


def test_a_full_block_is_copied_as_far_as_another_sequence_agrees() -> None:
    """Also while the one that computed it goes on."""
    common = [n % 90 for n in range(BLOCK + 2 * GRAIN + 1)]
    engine = Engine(block_size=BLOCK, max_num_batched_tokens=256)
    engine.add_tokens("a", [*common, *[91] * BLOCK], max_tokens=9)
    engine.step()
    engine.add_tokens("b", [*common, *[92] * BLOCK], max_tokens=9)
    plan = engine.step()
    assert plan.work[1].start == BLOCK + 2 * GRAIN
    assert len(plan.copies) == 1
    engine.finish()
    fresh = Engine(enable_prefix_caching=False)
    fresh.add_tokens("b", [*common, *[92] * BLOCK], max_tokens=9)
    fresh.finish()
    assert engine.tokens["b"] == fresh.tokens["b"]


def test_a_part_never_covers_the_last_token_nor_what_must_be_scored() -> None:
    engine = Engine(block_size=BLOCK)
    engine.add("a", 2 * GRAIN, max_tokens=GRAIN)
    engine.finish()
    engine.add("b", 2 * GRAIN, max_tokens=1)
    assert engine.step().work[0].start == GRAIN
    engine.add("c", 2 * GRAIN, max_tokens=1, prompt_logprobs=0)
    assert engine.step().work[0].start == 0
    engine.finish()


def test_the_next_turn_goes_on_where_the_last_one_ended() -> None:
    engine = Engine(block_size=BLOCK)
    engine.add("a", GRAIN, max_tokens=2 * GRAIN + 1)
    engine.finish()
    said = [*engine.runner.plans[0].new_rows[0].token_ids, *engine.tokens["a"]]
    engine.add_tokens("b", [*said, 1, 2, 3], max_tokens=2)
    assert engine.step().work[0].start == 3 * GRAIN


def test_the_last_token_of_an_answer_is_not_found_for_it_was_not_computed() -> None:
    engine = Engine(block_size=BLOCK)
    engine.add("a", GRAIN, max_tokens=2 * GRAIN)
    engine.finish()
    said = [*engine.runner.plans[0].new_rows[0].token_ids, *engine.tokens["a"]]
    engine.add_tokens("b", [*said, 1, 2, 3], max_tokens=2)
    assert engine.step().work[0].start == 2 * GRAIN


def test_of_an_aborted_prompt_whole_blocks_are_found_and_no_part() -> None:
    """Nothing was drawn behind it, so nobody knows whether what it left are numbers; who shares a
    whole block would have computed the same, but not who copies one for its beginning."""
    engine = Engine(block_size=BLOCK, max_num_batched_tokens=BLOCK + GRAIN)
    engine.add("a", 2 * BLOCK, max_tokens=1)
    engine.step()
    engine.core.abort(["a"])
    engine.finish()
    engine.add("b", BLOCK - 1, max_tokens=1)
    assert engine.step().work[0].start == 0
    engine.finish()
    engine.add("c", 2 * BLOCK, max_tokens=1)
    assert engine.step().work[0].start == BLOCK


def test_of_an_aborted_answer_what_was_computed_is_found() -> None:
    engine = Engine(block_size=BLOCK)
    engine.add("a", GRAIN, max_tokens=9)
    engine.step()
    engine.core.abort(["a"])
    engine.finish()
    engine.add("b", GRAIN, 5, max_tokens=1)
    assert engine.step().work[0].start == GRAIN


def test_a_part_ends_where_another_picture_begins() -> None:
    engine = Engine(block_size=BLOCK)
    for name, seed in (("a", 1), ("b", 2)):
        engine.add(name, GRAIN + 3, (seed, 2), 5, max_tokens=3)
        engine.finish()
        assert engine.tokens[name] == alone(GRAIN + 3, (seed, 2), 5, max_tokens=3)
    assert engine.ends["b"].cached_tokens == GRAIN


def test_a_part_may_end_inside_a_picture() -> None:
    """What is left of it is read from the encoder's output, which is there or made again."""
    engine = Engine(block_size=BLOCK, encoder_cache_bytes=GEOMETRY.tokens_per_tile * 40)
    engine.add("a", GRAIN - 2, (1, 2), max_tokens=1)
    engine.finish()
    engine.add("other", 3, (2, 4), max_tokens=1)
    engine.finish()
    engine.add("b", GRAIN - 2, (1, 2), max_tokens=3)  # the last token is never found
    assert engine.step().work[0].start == GRAIN
    engine.finish()
    assert engine.tokens["b"] == alone(GRAIN - 2, (1, 2), max_tokens=3)


def test_a_part_may_end_with_a_picture() -> None:
    """Where another question about it begins, though no grain ends there."""
    engine = Engine(block_size=BLOCK)
    for name, seed in (("a", 1), ("b", 2)):
        engine.add(name, (1, 3), 2 * GRAIN, seed=seed, max_tokens=3)
        engine.finish()
        assert engine.tokens[name] == alone((1, 3), 2 * GRAIN, seed=seed, max_tokens=3)
    assert engine.ends["b"].cached_tokens == 3 * GEOMETRY.tokens_per_tile


def test_salts_share_no_part() -> None:
    engine = Engine(block_size=BLOCK)
    for name, salt in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        engine.add(name, GRAIN + 1, max_tokens=1, salt=salt)
        engine.finish()
    assert [engine.ends[name].cached_tokens for name in "abc"] == [0, 0, GRAIN]


def test_no_part_of_a_failed_row_is_found_nor_what_it_was_copied_from() -> None:
    start, bad = [n % 90 for n in range(GRAIN)], 90
    engine = Engine(block_size=BLOCK, bad_after=frozenset({bad}))
    starts = []
    for name, last in (("good", 1), ("bad", bad), ("next", 1)):
        engine.add_tokens(name, [*start, last], max_tokens=2)
        starts.append(engine.step().work[0].start)
        engine.finish()
    assert engine.ends["bad"].error
    assert starts == [0, GRAIN, 0]


def test_no_part_is_found_of_a_row_that_failed_behind_its_end() -> None:
    """Its blocks were written once more, by the step that was under way when it ended."""
    (last,) = alone(GRAIN, max_tokens=1)
    engine = Engine(block_size=BLOCK, async_scheduling="on", bad_after=frozenset({last}))
    engine.add("a", GRAIN, max_tokens=9, stop=(last,))
    engine.finish()
    assert engine.ends["a"].finish_reason == "stop"
    engine.add("b", GRAIN, 5, max_tokens=1)
    engine.step()
    assert engine.runner.plans[-1].work[0].start == 0


def test_what_ran_through_a_flush_leaves_nothing() -> None:
    engine = Engine(block_size=BLOCK)
    for length in (BLOCK - 4, GRAIN + 1):
        engine.add(f"a{length}", length, max_tokens=9, seed=length)
        engine.step()
        engine.scheduler.flush()
        engine.finish()
        engine.add(f"b{length}", length, max_tokens=9, seed=length)
        assert engine.step().work[0].start == 0
        engine.finish()


def test_a_preempted_sequence_finds_what_nobody_has_overwritten() -> None:
    engine = Engine(block_size=BLOCK, num_kv_blocks=4)
    engine.add("a", BLOCK + GRAIN, max_tokens=2 * BLOCK)
    engine.add("b", GRAIN, max_tokens=2 * BLOCK, seed=1)
    while not engine.scheduler.stats.preemptions:
        engine.step()
    engine.finish()
    assert engine.tokens["a"] == alone(BLOCK + GRAIN, max_tokens=2 * BLOCK)
    assert engine.tokens["b"] == alone(GRAIN, max_tokens=2 * BLOCK, seed=1)


def test_the_block_to_copy_may_be_the_one_that_is_handed_out() -> None:
    """To the same sequence, or to another one of the same step."""
    engine = Engine(block_size=BLOCK, num_kv_blocks=2)
    engine.add("a", BLOCK - 1, max_tokens=1)
    engine.finish()
    engine.add("b", BLOCK - 1, max_tokens=1, seed=1)
    engine.finish()
    engine.add("c", BLOCK - 1, max_tokens=1)
    engine.add("d", BLOCK - 1, max_tokens=1, seed=1)
    copies = engine.step().copies
    assert copies
    assert {copy.source for copy in copies} & {copy.target for copy in copies}
    engine.finish()
    assert engine.tokens["c"] == engine.tokens["a"]
    assert engine.tokens["d"] == engine.tokens["b"]
