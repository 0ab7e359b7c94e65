"""What the scheduler plans, step by step, with a runner that checks every plan."""

import logging
import threading
from concurrent.futures import Future

import msgspec
import pytest

from engine.plan import StepPlan
from tests.fake_runner import EOS, TILE_BYTES, Engine, alone, picture, request
from wire.messages import EngineRequest, Flush, LogLevel, StepReport, VisionItem
from wire.sampling import SamplingParams


def work(plan: StepPlan) -> dict[str, tuple[int, int, bool]]:
    return {w.id: (w.start, w.count, w.sample) for w in plan.work}


# Catching up


def test_a_prompt_in_one_chunk_samples_its_first_token_in_the_first_step() -> None:
    engine = Engine()
    engine.add("a", 10, max_tokens=3)
    assert work(engine.step()) == {"a": (0, 10, True)}
    assert work(engine.step()) == {"a": (10, 1, True)}
    engine.finish()
    assert engine.ends["a"].finish_reason == "length"
    assert len(engine.tokens["a"]) == 3


def test_a_prompt_over_the_token_budget_is_computed_in_chunks() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add("a", 20, max_tokens=2)
    assert work(engine.step()) == {"a": (0, 8, False)}
    assert work(engine.step()) == {"a": (8, 8, False)}
    assert work(engine.step()) == {"a": (16, 4, True)}
    engine.finish()
    assert engine.tokens["a"] == alone(20, max_tokens=2)


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_request_goes_on_behind_the_output_it_had_from_another_engine(cut: int) -> None:
    parts, options = (3, (1, 2), 3), {"max_tokens": 12, "seed": 5}
    whole = alone(*parts, **options)
    original, buffers = request("a", *parts, **options)
    engine = Engine(max_num_batched_tokens=8)
    engine.core.add(msgspec.structs.replace(original, output=whole[:cut]), buffers)
    engine.finish()
    assert engine.tokens["a"] == whole[cut:]
    assert engine.ends["a"].finish_reason == "length"


def test_a_request_that_had_all_its_output_is_refused() -> None:
    original, buffers = request("a", 3, max_tokens=2)
    engine = Engine()
    engine.core.add(msgspec.structs.replace(original, output=[1, 2]), buffers)
    engine.core.add(msgspec.structs.replace(original, id="b", output=[10**6]), buffers)
    engine.finish()
    assert {name: end.finish_reason for name, end in engine.ends.items()} == {
        "a": "error",
        "b": "error",
    }


def test_chunks_may_end_inside_a_picture() -> None:
    engine = Engine(max_num_batched_tokens=5)
    engine.add("a", 3, (1, 4), 3, max_tokens=4)
    plan = engine.step()
    assert work(plan) == {"a": (0, 5, False)}
    assert [(item.start, item.tiles) for item in plan.encode] == [(0, 1)]
    assert [(item.start, item.tiles) for item in engine.step().encode] == [(1, 1)]
    engine.finish()
    assert engine.scheduler.stats.encoded_tiles == 4
    assert engine.tokens["a"] == alone(3, (1, 4), 3, max_tokens=4)


def test_rows_that_generate_are_not_held_up_by_a_long_prompt() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add("first", 4, max_tokens=20)
    engine.step()
    engine.add("long", 30, max_tokens=2)
    engine.add("last", 4, max_tokens=2)
    for _ in range(4):
        assert work(engine.step())["first"][1] == 1
    assert "last" not in engine.tokens
    engine.finish()


def test_a_long_prompt_that_arrived_earlier_leaves_a_token_to_each_later_row() -> None:
    engine = Engine(
        max_num_batched_tokens=8, max_num_encoder_tiles=1, encoder_cache_bytes=2 * TILE_BYTES
    )
    engine.add("x", 1, (1, 2), max_tokens=9)  # keeps the vision cache full for two steps
    engine.step()
    engine.add("pictures", 1, (2, 2), 40, max_tokens=2)
    engine.add("text", 2, max_tokens=30)
    while "text" not in engine.tokens:
        engine.step()
    while "pictures" not in engine.tokens:
        assert work(engine.step())["text"][1] == 1
    engine.finish()


def test_waiting_requests_start_in_order_of_arrival() -> None:
    engine = Engine(max_num_seqs=2)
    for name in "abcd":
        engine.add(name, 4, max_tokens=3)
    assert list(work(engine.step())) == ["a", "b"]
    engine.step()
    engine.step()
    assert list(work(engine.step())) == ["c", "d"]
    engine.finish()


# Ends


def test_a_stop_token_ends_with_stop_and_is_the_last_token() -> None:
    whole = alone(6, max_tokens=30)
    stop = whole[10]
    engine = Engine()
    engine.add("a", 6, max_tokens=30, stop=(stop,))
    engine.finish()
    end = engine.ends["a"]
    assert (end.finish_reason, end.stop_token) == ("stop", stop)
    assert engine.tokens["a"] == whole[: whole.index(stop) + 1]


def test_an_end_token_among_the_stop_ids_ends_with_stop() -> None:
    engine = Engine(draws_eos=True)
    for seed in range(40):
        engine.add(f"r{seed}", 4, max_tokens=20, seed=seed)
    engine.finish()
    stopped = [end for end in engine.ends.values() if end.finish_reason == "stop"]
    assert stopped
    for end in engine.ends.values():
        assert (EOS in engine.tokens[end.id]) == (end.finish_reason == "stop")
        assert EOS not in engine.tokens[end.id][:-1]


def test_an_end_token_that_a_request_does_not_list_does_not_end_it() -> None:
    engine = Engine(draws_eos=True)
    for seed in range(40):
        whole, _ = request(f"r{seed}", 4, max_tokens=20, seed=seed)
        sampling = msgspec.structs.replace(whole.sampling, stop_token_ids=())
        engine.core.add(msgspec.structs.replace(whole, sampling=sampling))
    engine.finish()
    assert any(EOS in tokens[:-1] for tokens in engine.tokens.values())
    assert {end.finish_reason for end in engine.ends.values()} == {"length"}


def test_a_stop_token_on_the_last_allowed_position_is_still_a_stop() -> None:
    whole = alone(6, max_tokens=30)
    length = next(i for i, token in enumerate(whole) if token not in whole[:i] and i > 3) + 1
    engine = Engine()
    engine.add("a", 6, max_tokens=length, stop=(whole[length - 1],))
    engine.finish()
    assert engine.ends["a"].finish_reason == "stop"


def test_the_context_ends_a_sequence_with_length() -> None:
    engine = Engine(max_model_len=20)
    engine.add("a", 15, max_tokens=100)
    engine.finish()
    assert len(engine.tokens["a"]) == 5
    assert engine.ends["a"].finish_reason == "length"


def test_the_whole_cache_can_be_used_by_one_sequence_and_ends_it_with_length() -> None:
    engine = Engine(num_kv_blocks=5)
    engine.add("a", 17, max_tokens=100)
    engine.finish()
    assert len(engine.tokens["a"]) == 5 * 4 + 1 - 17
    assert engine.ends["a"].finish_reason == "length"


def test_a_row_that_cannot_be_sampled_ends_alone() -> None:
    bad = alone(5, max_tokens=9, seed=1)[4]
    engine = Engine(bad_after=frozenset({bad}))
    engine.add("bad", 5, max_tokens=9, seed=1)
    engine.add("good", 6, max_tokens=9, seed=2)
    engine.finish()
    assert engine.ends["bad"].finish_reason == "error"
    assert engine.ends["bad"].error == "the logits are not finite"
    assert engine.ends["bad"].token_ids == []
    assert engine.tokens["good"] == alone(6, max_tokens=9, seed=2)


# Refusals


@pytest.mark.parametrize(
    ("parts", "text"),
    [((20,), "limit of 20"), ((0,), "nothing to compute")],
)
def test_a_prompt_that_can_never_be_computed_is_refused(parts: tuple[int], text: str) -> None:
    engine = Engine(max_model_len=20)
    engine.add("a", *parts)
    engine.add("b", 19, max_tokens=5)
    engine.finish()
    assert engine.ends["a"].finish_reason == "error"
    assert text in (engine.ends["a"].error or "")
    assert len(engine.tokens["b"]) == 1


def test_a_prompt_with_more_blocks_than_exist_is_refused() -> None:
    engine = Engine(num_kv_blocks=4)
    engine.add("a", 17)
    engine.add("b", 16, max_tokens=9)
    engine.finish()
    assert engine.ends["a"].finish_reason == "error"
    assert len(engine.tokens["b"]) == 1


def test_an_id_in_use_is_refused_without_harm_to_its_owner() -> None:
    engine = Engine()
    engine.add("a", 5, max_tokens=4)
    engine.step()
    engine.core.add(*request("a", 9))
    report = engine.core.step()
    assert report is not None
    assert [output.finish_reason for output in report.outputs] == ["error", None]
    while engine.core.has_work:
        report = engine.core.step()
    assert engine.scheduler.stats.generated_tokens == 4


def _with_item(**changes: object) -> tuple[EngineRequest, list[bytes]]:
    whole, buffers = request("a", 2, (1, 2), 2)
    item = msgspec.structs.replace(whole.items[0], **changes)
    return msgspec.structs.replace(whole, items=[item]), buffers


@pytest.mark.parametrize(
    "broken",
    [
        _with_item(buffer=1),
        _with_item(buffer=-1),
        _with_item(offset=6),
        _with_item(offset=-1),
        _with_item(length=7),
        _with_item(tiles=0, length=0),
        (request("a", 2, (1, 2))[0], [b"short"]),
        (msgspec.structs.replace(request("a", 3)[0], prompt=[1, 97]), []),
        (msgspec.structs.replace(request("a", 3)[0], prompt=[-1]), []),
        (request("a", 3, max_tokens=0)[0], []),
        (EngineRequest("a", [1], SamplingParams(stop_token_ids=(97,))), []),
        (EngineRequest("a", [1], SamplingParams(logit_bias=((-1, 1.0),))), []),
        (EngineRequest("a", [1], SamplingParams(bad_words=((1, 200),))), []),
        (EngineRequest("a", [1], SamplingParams(bad_words=((),))), []),
        (EngineRequest("a", [1], SamplingParams(repetition_penalty=0.0)), []),
        (
            EngineRequest(
                "a",
                [96] * 8,
                SamplingParams(),
                [VisionItem(b"x", 0, 4, 1, 0), VisionItem(b"y", 3, 4, 1, 0)],
            ),
            [picture(1)[1]],
        ),
    ],
)
def test_a_request_that_contradicts_itself_ends_with_an_error(
    broken: tuple[EngineRequest, list[bytes]],
) -> None:
    engine = Engine()
    engine.core.add(*broken)
    engine.finish()
    assert engine.ends["a"].finish_reason == "error"
    assert not engine.runner.plans


# Memory


def test_a_sequence_that_needs_a_block_preempts_the_one_that_arrived_last() -> None:
    engine = Engine(num_kv_blocks=7)
    for seed, name in enumerate("abc"):
        engine.add(name, 7, max_tokens=8, seed=seed)
    while not engine.scheduler.stats.preemptions:
        plan = engine.step()
    assert plan.preempted == ["c"]
    assert engine.scheduler.stats.waiting == 1
    known = len(engine.tokens["c"])
    while not (again := [n for p in engine.runner.plans[plan.step :] for n in p.new_rows]):
        engine.step()
    assert len(again[0].token_ids) == 7 + known
    assert again[0].prompt_len == 7
    engine.finish()
    for seed, name in enumerate("abc"):
        assert engine.tokens[name] == alone(7, max_tokens=8, seed=seed)


def test_a_preempted_sequence_keeps_its_place_before_those_that_wait() -> None:
    engine = Engine(num_kv_blocks=7)
    for seed, name in enumerate("abcd"):
        engine.add(name, 7, max_tokens=9, seed=seed)
    engine.finish()
    starts = [new.id for plan in engine.runner.plans for new in plan.new_rows]
    assert engine.scheduler.stats.preemptions > 0
    assert starts == sorted(starts)


def test_a_preempted_sequence_with_a_picture_encodes_it_again_if_it_was_dropped() -> None:
    engine = Engine(num_kv_blocks=9, encoder_cache_bytes=TILE_BYTES, enable_prefix_caching=False)
    engine.add("a", 6, max_tokens=16)
    engine.add("b", 3, (1, 1), max_tokens=16, seed=1)
    engine.add("c", 3, (2, 1), max_tokens=16, seed=2)
    engine.finish()
    encoded = [item.request_id for plan in engine.runner.plans for item in plan.encode]
    assert encoded.count("c") > 1
    assert engine.tokens["c"] == alone(3, (2, 1), max_tokens=16, seed=2)


def test_the_last_sequence_waits_for_a_block_without_losing_its_own() -> None:
    engine = Engine(num_kv_blocks=5)
    engine.add("a", 4, max_tokens=5)
    engine.add("b", 8, max_tokens=9, seed=1)
    plans = [engine.step() for _ in range(3)]
    assert all("a" in work(plan) for plan in plans)
    engine.finish()
    assert engine.scheduler.stats.preemptions == 0
    assert engine.tokens["b"] == alone(8, max_tokens=9, seed=1)


def test_admission_leaves_a_block_to_the_sequences_that_run() -> None:
    engine = Engine(num_kv_blocks=4)
    engine.add("a", 8, max_tokens=4)
    engine.add("b", 8, max_tokens=4, seed=1)
    assert list(work(engine.step())) == ["a"]
    engine.finish()
    assert engine.scheduler.stats.preemptions == 0


# Pictures


def tiles(plan: StepPlan) -> list[tuple[bytes, int, int]]:
    return [(item.digest, item.start, item.tiles) for item in plan.encode]


def test_the_encoder_budget_spreads_the_tiles_of_pictures_over_steps() -> None:
    engine = Engine(max_num_encoder_tiles=3)
    engine.add("a", 2, (1, 2), 1, (2, 2), 1, max_tokens=2)
    plan = engine.step()
    assert tiles(plan) == [(b"picture-1-2", 0, 2), (b"picture-2-2", 0, 1)]
    assert work(plan) == {"a": (0, 15, False)}
    assert tiles(engine.step()) == [(b"picture-2-2", 1, 1)]
    engine.finish()
    assert engine.tokens["a"] == alone(2, (1, 2), 1, (2, 2), 1, max_tokens=2)


def test_a_picture_is_not_encoded_before_the_step_that_reaches_it() -> None:
    engine = Engine(max_num_batched_tokens=6)
    engine.add("a", 6, (1, 1), max_tokens=2)
    assert not engine.step().encode
    assert engine.step().encode
    engine.finish()


def test_a_picture_over_the_encoder_budget_takes_several_steps() -> None:
    engine = Engine(max_num_encoder_tiles=2)
    engine.add("small", 1, (1, 1), max_tokens=2)
    engine.add("large", 1, (2, 6), max_tokens=2)
    engine.finish()
    encoded = [tiles(plan) for plan in engine.runner.plans if plan.encode]
    small, large = b"picture-1-1", b"picture-2-6"
    assert encoded == [
        [(small, 0, 1), (large, 0, 1)], [(large, 1, 2)], [(large, 3, 2)], [(large, 5, 1)]
    ]  # fmt: skip


def test_what_one_request_had_encoded_of_a_picture_is_not_encoded_for_the_next() -> None:
    engine = Engine(max_num_encoder_tiles=2, max_num_batched_tokens=9)
    engine.add("a", 1, (1, 6), max_tokens=2)
    assert tiles(engine.step()) == [(b"picture-1-6", 0, 2)]
    engine.core.abort(["a"])
    engine.add("b", 3, (1, 6), max_tokens=2)
    assert tiles(engine.step()) == []
    assert tiles(engine.step()) == [(b"picture-1-6", 2, 2)]
    engine.finish()
    assert engine.scheduler.stats.encoded_tiles == 6
    assert engine.tokens["b"] == alone(3, (1, 6), max_tokens=2)


def test_tiles_whose_positions_are_all_in_the_prefix_cache_are_not_encoded() -> None:
    engine = Engine(encoder_cache_bytes=1)  # so that nothing stays encoded
    engine.add("a", 2, (1, 4), 1, max_tokens=2)
    engine.finish()
    engine.add("again", 2, (1, 4), max_tokens=2)
    assert work(engine.step()) == {"again": (16, 2, True)}
    assert tiles(engine.runner.plans[-1]) == [(b"picture-1-4", 3, 1)]
    engine.finish()
    assert engine.tokens["again"] == alone(2, (1, 4), max_tokens=2)


def test_a_sequence_gets_on_with_a_picture_begun_while_an_earlier_one_waits_for_its_room() -> None:
    engine = Engine(
        scheduling_policy="priority", max_num_encoder_tiles=1, encoder_cache_bytes=4 * TILE_BYTES
    )
    engine.add("begun", 1, (1, 3), max_tokens=2)
    engine.step()
    engine.add("better", 1, (2, 3), max_tokens=2, priority=-1)
    engine.step()
    assert tiles(engine.runner.plans[-1]) == [(b"picture-1-3", 1, 1)]
    engine.finish()
    assert engine.tokens["better"] == alone(1, (2, 3), max_tokens=2)


def test_a_picture_over_the_whole_vision_cache_is_still_answered() -> None:
    engine = Engine(encoder_cache_bytes=TILE_BYTES, max_num_batched_tokens=7)
    engine.add("small", 1, (1, 1), 8, max_tokens=5)
    engine.add("large", 1, (2, 5), 2, max_tokens=5)
    engine.add("text", 3, max_tokens=5)
    engine.finish()
    assert engine.tokens["large"] == alone(1, (2, 5), 2, max_tokens=5)
    assert b"picture-2-5" not in engine.runner.tensors


def test_two_requests_with_one_picture_share_its_encoding() -> None:
    engine = Engine()
    engine.add("a", 2, (1, 2), max_tokens=2)
    engine.add("b", 5, (1, 2), 3, max_tokens=2)
    engine.step()
    engine.add("c", (1, 2), 1, max_tokens=2)
    engine.finish()
    assert engine.scheduler.stats.encoded_tiles == 2
    assert engine.tokens["c"] == alone((1, 2), 1, max_tokens=2)


def test_one_picture_twice_in_a_request_is_encoded_once() -> None:
    engine = Engine(max_num_batched_tokens=3)
    engine.add("a", 2, (1, 1), 2, (1, 1), 1, max_tokens=2)
    engine.finish()
    assert engine.scheduler.stats.encoded_tiles == 1
    assert engine.tokens["a"] == alone(2, (1, 1), 2, (1, 1), 1, max_tokens=2)


def test_pictures_that_fill_the_cache_one_by_one_all_get_through() -> None:
    parts = [part for i in range(6) for part in (1, (i, 2))]
    engine = Engine(encoder_cache_bytes=2 * TILE_BYTES)
    engine.add("a", *parts, max_tokens=3)
    engine.add("b", *reversed(parts), max_tokens=3)
    engine.finish()
    assert engine.tokens["a"] == alone(*parts, max_tokens=3)
    assert engine.tokens["b"] == alone(*reversed(parts), max_tokens=3)


def test_later_requests_do_not_take_the_room_that_an_earlier_picture_waits_for() -> None:
    engine = Engine(encoder_cache_bytes=4 * TILE_BYTES, max_num_batched_tokens=6)
    engine.add("first", 1, (1, 2), 1, max_tokens=2)
    engine.step()
    engine.add("wide", 1, (2, 4), max_tokens=2)
    for i in range(6):
        engine.add(f"narrow{i}", (10 + i, 1), max_tokens=2)
    engine.finish()
    encoded = [item.request_id for plan in engine.runner.plans for item in plan.encode]
    assert encoded[:2] == ["first", "wide"]


# Aborts


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_abort_frees_blocks_pictures_and_raw_tiles_at_once(steps: int) -> None:
    engine = Engine(max_num_batched_tokens=4)
    engine.add("a", 3, (1, 3), 4, max_tokens=50)
    for _ in range(steps):
        engine.step()
    engine.core.abort(["a", "unknown"])
    engine.scheduler.check()
    assert engine.scheduler.stats.blocks_used == 0
    assert engine.core.has_work
    assert engine.step().removed == ["a"]
    assert not engine.runner.raw
    assert not engine.core.has_work
    assert not engine.ends


def test_an_abort_between_plan_and_commit_drops_that_row_only() -> None:
    engine = Engine()
    engine.add("a", 3, (1, 3), max_tokens=5)
    engine.add("b", 3, (1, 3), 2, max_tokens=5)
    plan = engine.scheduler.plan()
    assert plan is not None
    result = engine.runner.execute(plan)
    engine.core.abort(["a"])
    outputs = engine.scheduler.commit(result)
    engine.scheduler.check()
    assert [output.id for output in outputs] == ["b"]
    engine.take(StepReport(outputs, engine.scheduler.stats))
    engine.finish()
    assert engine.tokens["b"] == alone(3, (1, 3), 2, max_tokens=5)


def test_blocks_freed_by_an_abort_are_used_only_after_the_runner_let_go() -> None:
    engine = Engine(num_kv_blocks=4)
    engine.add("a", 15, max_tokens=2)
    engine.step()
    engine.core.abort(["a"])
    engine.add("b", 15, max_tokens=2)
    plan = engine.step()
    assert plan.removed == ["a"]
    assert list(work(plan)) == ["b"]
    engine.finish()


# Flush


def test_after_a_flush_nothing_earlier_is_found_and_answers_stay_the_same() -> None:
    engine = Engine()
    parts = (20, (1, 2), 30)
    engine.add("before", *parts, max_tokens=3)
    engine.finish()
    engine.add("found", *parts, max_tokens=3)
    engine.step()
    found = engine.scheduler.stats.cached_tokens
    assert found > 0
    engine.core.take(Flush(), ())  # while one runs that uses what was found
    engine.finish()
    assert engine.scheduler.stats.vision_bytes == 0
    engine.add("after", *parts, max_tokens=3)
    engine.finish()
    assert engine.scheduler.stats.cached_tokens == found
    encoded = [item.request_id for plan in engine.runner.plans for item in plan.encode]
    assert encoded.count("after") == encoded.count("before")
    assert engine.tokens["before"] == engine.tokens["found"] == engine.tokens["after"]
    engine.add("again", *parts, max_tokens=3)
    engine.finish()
    assert engine.scheduler.stats.cached_tokens > found


def test_the_engine_logs_at_the_level_it_is_told() -> None:
    before = logging.getLogger().level
    try:
        for level in ("error", "debug"):
            Engine().core.take(LogLevel(level), ())
            assert logging.getLevelName(logging.getLogger().level) == level.upper()
    finally:
        logging.getLogger().setLevel(before)


# Bookkeeping


def test_the_same_calls_give_the_same_plans_byte_for_byte() -> None:
    def run() -> list[bytes]:
        engine = Engine(num_kv_blocks=20, max_num_batched_tokens=9, max_num_encoder_tiles=2)
        for i in range(12):
            engine.add(f"r{i}", 2, (i % 3, 1 + i % 2), i % 5, max_tokens=6, seed=i)
        for _ in range(5):
            engine.step()
        engine.core.abort(["r2", "r7"])
        engine.finish()
        return [msgspec.msgpack.encode(plan) for plan in engine.runner.plans]

    assert run() == run()


def test_a_plan_never_changes_after_it_was_made() -> None:
    engine = Engine()
    engine.add("a", 7, max_tokens=20)
    plan = engine.step()
    before = msgspec.msgpack.encode(plan)
    engine.finish()
    assert msgspec.msgpack.encode(plan) == before


def test_counters_count_each_request_once_even_when_it_was_preempted() -> None:
    engine = Engine(num_kv_blocks=7)
    for name in "abc":
        engine.add(name, 7, max_tokens=8)
    engine.finish()
    stats = engine.scheduler.stats
    assert stats.preemptions > 0
    assert (stats.prompt_tokens, stats.generated_tokens) == (21, 24)
    assert stats.steps == len(engine.runner.plans)
    assert (stats.running, stats.waiting, stats.blocks_total) == (0, 0, 7)


def test_two_plans_may_be_under_way_and_no_more() -> None:
    engine = Engine()
    engine.add("a", 5)
    engine.scheduler.plan()
    engine.scheduler.plan()
    with pytest.raises(AssertionError, match="not committed"):
        engine.scheduler.plan()


# What must be prepared first


def test_a_request_is_scheduled_when_what_it_needs_is_prepared() -> None:
    engine = Engine()
    done = engine.runner.preparing["slow"] = Future()
    engine.add("slow", 3, (1, 2), max_tokens=4)
    engine.add("quick", 5, max_tokens=2)
    for _ in range(2):
        assert list(work(engine.step())) == ["quick"]
    report = engine.core.step()  # for the runner to forget the quick one
    assert report is not None
    assert report.stats.waiting == 1
    done.set_result(None)
    engine.finish()
    assert engine.tokens["slow"] == alone(3, (1, 2), max_tokens=4)


def test_an_idle_step_waits_a_moment_for_what_is_prepared_and_lets_others_in() -> None:
    engine = Engine()
    done = engine.runner.preparing["slow"] = Future()
    watchdog = threading.Timer(10, done.set_result, [None])
    watchdog.start()
    engine.add("slow", 3, max_tokens=1)
    report = engine.core.step()
    assert report is not None
    assert not report.outputs
    engine.add("quick", 5, max_tokens=1)
    assert list(work(engine.step())) == ["quick"]
    watchdog.cancel()
    assert not done.done()
    done.set_result(None)
    assert list(work(engine.step())) == ["slow"]


def test_a_request_can_be_aborted_while_it_is_prepared() -> None:
    engine = Engine()
    done = engine.runner.preparing["a"] = Future()
    engine.add("a", 3, (1, 1))
    engine.core.abort(["a"])
    assert done.cancelled()
    assert not engine.core.has_work
    engine.finish()
    assert not engine.runner.plans


def test_a_request_that_cannot_be_prepared_ends_alone() -> None:
    engine = Engine()
    done = engine.runner.preparing["a"] = Future()
    engine.add("a", 3)
    engine.add("a", 3)  # while the first is being prepared
    done.set_exception(ValueError("no such rule"))
    engine.add("b", 3, max_tokens=2)
    report = engine.core.step()
    assert report is not None
    errors = [output.error for output in report.outputs if output.id == "a"]
    assert errors == [
        "a request with this id is still being handled",
        "it could not be prepared: ValueError",
    ]
    others = [output for output in report.outputs if output.id != "a"]
    engine.take(StepReport(others, report.stats))
    engine.finish()
    assert engine.tokens["b"] == alone(3, max_tokens=2)
