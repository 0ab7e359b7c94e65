"""The prefix cache: what names a block, who finds it, and what a hit saves."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.blocks import BlockPool
from engine.prefix import extend_digests
from tests.fake_runner import GEOMETRY, Engine, alone, request
from wire.messages import VisionItem

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
