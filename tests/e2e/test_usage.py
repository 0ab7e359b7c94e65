"""What usage says of pictures, through the official client, on the demo model."""

from typing import Any

from openai.types import CompletionUsage

from tests.servers import Server, draw, part


def images(usage: CompletionUsage | None) -> list[dict[str, Any]]:
    assert usage is not None
    return usage.model_dump()["internvl"]["images"]


def ask(server: Server, *content: Any, **options: Any) -> CompletionUsage | None:
    messages: Any = [{"role": "user", "content": [part(item) for item in content]}]
    with server.client() as client:
        answer = client.chat.completions.create(
            model="internvl-demo", messages=messages, max_tokens=2, temperature=0, **options
        )
        if options.get("stream"):
            return list(answer)[-1].usage
        return answer.usage


def test_each_picture_is_accounted_for_and_the_second_time_costs_nothing(
    demo_server: Server,
) -> None:
    # Colours that no other test draws on: the server's caches are shared.
    wide = draw("red", "circle", (640, 200), (11, 22, 33))
    small = draw("blue", "square", (90, 60), (33, 22, 11))
    question = (wide, small, "What is in these pictures?")
    first = ask(demo_server, *question)
    assert first is not None
    one, two = images(first)
    assert (one["index"], one["width"], one["height"]) == (0, 640, 200)
    assert (two["index"], two["width"], two["height"]) == (1, 90, 60)
    columns, rows = one["grid"]
    assert columns > rows >= 1
    assert one["tiles"] == columns * rows + 1  # and the thumbnail
    assert one["tokens"] + two["tokens"] == first.prompt_tokens_details.image_tokens  # type: ignore[union-attr]
    assert one["tokens"] * two["tiles"] == two["tokens"] * one["tiles"]
    assert one["cached_tokens"] == two["cached_tokens"] == 0
    assert min(one["preprocess_ms"], two["preprocess_ms"]) > 0
    assert min(one["fetch_ms"], two["fetch_ms"]) >= 0
    assert min(one["encode_ms"], two["encode_ms"]) > 0
    again = images(ask(demo_server, *question, stream=True, stream_options={"include_usage": True}))
    for before, after in zip((one, two), again, strict=True):
        assert after["cached_tokens"] > 0
        assert after["encode_ms"] == after["preprocess_ms"] == 0
        same = ("index", "width", "height", "grid", "tiles", "tokens")
        assert [after[name] for name in same] == [before[name] for name in same]
    assert again[0]["cached_tokens"] == one["tokens"]


def test_a_picture_in_another_place_is_encoded_no_more_but_computed_again(
    demo_server: Server,
) -> None:
    shown = draw("green", "triangle", (100, 100), (1, 2, 77))
    (before,) = images(ask(demo_server, shown, "What is this?"))
    (after,) = images(ask(demo_server, "Look at this:", shown, "What is this?"))
    assert before["encode_ms"] > 0
    assert (after["encode_ms"], after["preprocess_ms"], after["cached_tokens"]) == (0, 0, 0)
