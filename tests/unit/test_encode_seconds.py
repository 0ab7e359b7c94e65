"""Whom the time of the encoder is charged to, with a runner whose every tile takes as long."""

import pytest

from tests.fake_runner import GEOMETRY, TILE_BYTES, TILE_SECONDS, Engine, crowded


def charged(engine: Engine, name: str) -> list[float]:
    """Tiles that each item of a request paid for, over all its outputs."""
    parts = engine.encode_seconds.get(name, [])
    return [sum(column) / TILE_SECONDS for column in zip(*parts, strict=True)]


def encoded(engine: Engine) -> int:
    return sum(item.tiles for plan in engine.runner.plans for item in plan.encode)


@pytest.fixture(params=["off", "on"])
def pipelined(request: pytest.FixtureRequest) -> str:
    return request.param


def test_pictures_encoded_over_several_steps_are_all_in_the_first_output(pipelined: str) -> None:
    engine = Engine(max_num_batched_tokens=9, max_num_encoder_tiles=4, async_scheduling=pipelined)
    engine.add("a", 3, (1, 4), 3, (2, 1), (3, 2), max_tokens=5)
    engine.finish()
    assert len([plan for plan in engine.runner.plans if plan.encode]) > 1
    assert len(engine.encode_seconds["a"]) == 1
    assert charged(engine, "a") == [4, 1, 2]


def test_of_those_who_show_one_picture_who_has_it_encoded_pays(pipelined: str) -> None:
    engine = Engine(async_scheduling=pipelined)
    engine.add("a", 2, (1, 2), 1, max_tokens=4)
    engine.add("b", 3, (1, 2), (2, 3), 1, max_tokens=4)
    engine.finish()
    assert charged(engine, "a") == [2]
    assert charged(engine, "b") == [0, 3]


def test_a_picture_shown_twice_is_paid_once(pipelined: str) -> None:
    engine = Engine(async_scheduling=pipelined)
    engine.add("a", 2, (1, 2), 1, (1, 2), 1, max_tokens=4)
    engine.finish()
    assert charged(engine, "a") == [2, 0]


def test_what_a_cache_had_costs_nothing(pipelined: str) -> None:
    engine = Engine(async_scheduling=pipelined)
    engine.add("a", (1, 2), 1, max_tokens=4)
    engine.finish()
    engine.add("prefix", (1, 2), 1, max_tokens=4)
    engine.add("encoded", 1, (1, 2), 1, max_tokens=4)
    engine.finish()
    assert engine.ends["prefix"].cached_tokens == 2 * GEOMETRY.tokens_per_tile
    assert engine.ends["encoded"].cached_tokens == 0
    assert set(engine.encode_seconds) == {"a"}


def test_preempted_requests_pay_for_each_time_a_picture_is_encoded(pipelined: str) -> None:
    engine = crowded(pipelined)
    assert engine.scheduler.stats.preemptions > 0
    assert charged(engine, "c")[0] > 1
    assert sum(charged(engine, "b") + charged(engine, "c")) == encoded(engine)


def test_a_request_preempted_before_its_first_output_pays_for_all(pipelined: str) -> None:
    engine = Engine(
        num_kv_blocks=11,
        max_num_batched_tokens=6,
        encoder_cache_bytes=TILE_BYTES,
        enable_prefix_caching=False,
        async_scheduling=pipelined,
    )
    engine.add("a", 4, max_tokens=30)
    engine.add("b", 1, (1, 1), 2, (2, 1), 22, max_tokens=4, seed=1)
    engine.finish()
    back = [new for plan in engine.runner.plans for new in plan.new_rows if new.id == "b"]
    assert len(back) > 1
    assert len(back[-1].token_ids) == back[-1].prompt_len, "it had generated something"
    assert sum(charged(engine, "b")) == encoded(engine) > 2
    assert len(engine.encode_seconds["b"]) == 1


def test_what_is_encoded_for_an_aborted_request_is_charged_to_nobody(pipelined: str) -> None:
    engine = Engine(async_scheduling=pipelined, max_num_batched_tokens=6)
    engine.add("a", 1, (1, 1), 20, max_tokens=4)
    engine.add("b", 1, (1, 1), 20, max_tokens=4, seed=1)
    engine.step()
    engine.core.abort(["a"])
    engine.finish()
    assert encoded(engine) == 1
    assert not engine.encode_seconds
