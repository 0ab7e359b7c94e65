"""Through real processes and sockets, on the demo model: it sees, and requests never mix."""

import http.server
import itertools
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from tests.servers import COLOURS, SHAPES, Server, data_uri, draw, encode, part

THINGS = list(itertools.product(COLOURS, SHAPES))


@pytest.mark.parametrize("size", [(112, 112), (448, 448), (300, 200)])
def test_it_names_the_colour_and_shape_of_every_thing(
    demo_server: Server, size: tuple[int, int]
) -> None:
    wrong = []
    for colour, shape in THINGS:
        answer = demo_server.ask(draw(colour, shape, size), "What is in this picture?")
        if colour not in answer or shape not in answer:
            wrong.append((colour, shape, answer))
    assert not wrong


def test_a_streamed_answer_is_the_answer(demo_server: Server) -> None:
    for colour, shape in THINGS[:4]:
        question = (draw(colour, shape), "What shape is this and what colour is it?")
        assert demo_server.ask(*question, stream=True) == demo_server.ask(*question)


@pytest.mark.parametrize(
    ("kind", "mime"),
    [
        ("png", "image/png"),
        ("jpeg", "image/jpeg"),
        ("webp", "image/webp"),
        ("gif", "image/gif"),
    ],
)
def test_every_usual_encoding_is_seen_alike(demo_server: Server, kind: str, mime: str) -> None:
    picture = data_uri(encode(draw("blue", "square"), kind), mime)
    answer = demo_server.ask(picture, "What is in this picture?")
    assert "blue" in answer
    assert "square" in answer


@pytest.fixture
def picture_host() -> Iterator[str]:
    body = encode(draw("green", "triangle"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{host.server_port}/picture.png"
    host.shutdown()
    thread.join()
    host.server_close()


def test_a_picture_behind_a_url_is_seen(demo_server: Server, picture_host: str) -> None:
    answer = demo_server.ask(picture_host, "What is in this picture?")
    assert "green" in answer
    assert "triangle" in answer


def test_text_alone_and_several_turns_work(demo_server: Server) -> None:
    with demo_server.client() as client:
        messages: list = [{"role": "user", "content": "Hello!"}]
        first = client.chat.completions.create(model="internvl-demo", messages=messages)
        assert first.choices[0].message.content
        picture = {
            "type": "image_url",
            "image_url": {"url": data_uri(encode(draw("red", "circle")))},
        }
        messages += [
            {"role": "assistant", "content": first.choices[0].message.content},
            {
                "role": "user",
                "content": [picture, {"type": "text", "text": "What is in this picture?"}],
            },
        ]
        second = client.chat.completions.create(model="internvl-demo", messages=messages)
        assert second.usage is not None
        assert second.usage.prompt_tokens > first.usage.prompt_tokens + 16
        assert second.choices[0].finish_reason == "stop"


def test_fifty_concurrent_mixed_requests_each_get_their_own_answer(demo_server: Server) -> None:
    """Answers under load must be the answers each request gets alone, to the letter."""
    questions: list[tuple[Image.Image | str, ...]] = []
    for index in range(50):
        colour, shape = THINGS[index % len(THINGS)]
        size = [(112, 112), (224, 224), (300, 200), (448, 150)][index % 4]
        picture = draw(colour, shape, size)
        if index % 5 == 4:
            questions.append((f"Hello number {index}!",))
        elif index % 5 == 3:
            other = draw(*THINGS[(index + 5) % len(THINGS)])
            questions.append((picture, other, "What is in the second picture?"))
        else:
            questions.append((picture, f"What is in picture {index}?"))
    alone = [demo_server.ask(*question) for question in questions]
    with ThreadPoolExecutor(50) as pool:
        futures = [
            pool.submit(demo_server.ask, *question, stream=index % 2 == 0)
            for index, question in enumerate(questions)
        ]
        together = [future.result(timeout=120) for future in futures]
    assert together == alone
    assert len(set(alone)) > 5


def test_a_seeded_draw_does_not_depend_on_the_batch(demo_server: Server) -> None:
    question = (draw("yellow", "circle"), "Describe this picture.")
    options = {"temperature": 1.0, "seed": 7, "top_p": 0.95}
    alone = demo_server.ask(*question, **options)
    with ThreadPoolExecutor(8) as pool:
        noise = [pool.submit(demo_server.ask, *question, temperature=1.0, seed=s) for s in range(7)]
        together = pool.submit(demo_server.ask, *question, **options).result(timeout=60)
        for future in noise:
            future.result(timeout=60)
    assert together == alone


def test_the_second_question_about_a_picture_finds_the_first_ones_prefix(
    demo_server: Server,
) -> None:
    picture = draw("blue", "triangle", (448, 448), "gray")
    with demo_server.client() as client:

        def ask(question: str) -> Any:
            content = [part(picture), part(question)]
            messages: Any = [{"role": "user", "content": content}]
            return client.chat.completions.create(
                model="internvl-demo", messages=messages, temperature=0
            )

        first, again, other = map(ask, ("What is this?", "What is this?", "Is there a blue star?"))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    for answer in (again, other):
        details = answer.usage.prompt_tokens_details
        assert details.cached_tokens >= details.image_tokens > 100
    assert again.choices[0].message.content == first.choices[0].message.content


def test_biases_and_bad_words_change_what_a_sure_model_says(demo_server: Server) -> None:
    question = (draw("red", "circle"), "What is in this picture?")
    plain = demo_server.ask(*question)
    assert "red" in plain
    banned = demo_server.ask(*question, extra_body={"bad_words": ["red"]})
    assert "red" not in banned
    assert "circle" in banned
    longer = demo_server.ask(*question, extra_body={"min_tokens": 30}, max_tokens=30)
    assert longer.startswith(plain)
    assert len(longer) > len(plain)


def test_four_choices_are_four_requests_with_seeds_in_a_row(demo_server: Server) -> None:
    content = [part(draw("green", "square", (300, 200))), part("Hello number 5!")]
    options: Any = {
        "model": "internvl-demo",
        "messages": [{"role": "user", "content": content}],
        "temperature": 1.5,
        "max_tokens": 40,
        "logprobs": True,
        "top_logprobs": 3,
        "presence_penalty": 0.5,
    }
    with demo_server.client() as client:
        create = client.chat.completions.create
        together = create(n=4, seed=11, **options)
        alone = [create(seed=11 + k, **options) for k in range(4)]
    texts = [choice.message.content for choice in together.choices]
    assert texts == [answer.choices[0].message.content for answer in alone]
    assert len(set(texts)) > 1
    assert together.usage.completion_tokens == sum(a.usage.completion_tokens for a in alone)
    for choice in together.choices:
        for entry in choice.logprobs.content:
            shares = [math.exp(likely.logprob) for likely in entry.top_logprobs]
            assert sorted(shares, reverse=True) == shares
            assert sum(shares) <= 1.0001


def test_one_picture_asked_about_by_fifty_is_encoded_once(demo_server: Server) -> None:
    name = "internvl_encoded_tiles_total"
    picture = draw("green", "triangle", (117, 113), "black")  # nobody else's
    before = demo_server.metric(name)
    assert before is not None
    with ThreadPoolExecutor(50) as pool:
        # The question comes first, and every one is another: no two share a prompt's beginning.
        answers = list(
            pool.map(
                lambda n: demo_server.ask(f"Number {n}: what is in this picture?", picture),
                range(50),
            )
        )
    assert len(answers) == 50
    assert demo_server.metric(name) == before + 1


def beside(left: tuple[str, str], right: tuple[str, str]) -> Image.Image:
    """Two things next to each other."""
    picture = Image.new("RGB", (224, 112), "white")
    picture.paste(draw(*left), (0, 0))
    picture.paste(draw(*right), (112, 0))
    return picture


PAIRS = [(one, other) for one, other in zip(THINGS, THINGS[5:] + THINGS[:5], strict=True)]


def test_it_knows_left_from_right_and_which_picture_is_meant(demo_server: Server) -> None:
    """A small model may be wrong once in a while; guessing would be wrong half of the time."""
    asked = right = 0
    for one, other in PAIRS:
        name, another = " ".join(one), " ".join(other)
        picture = beside(one, other)
        for question, answer in (
            (f"Where is the {name}?", "It is on the left."),
            (f"Where is the {another}?", "It is on the right."),
            (f"Is the {name} left of the {another}?", "Yes."),
            (f"Is the {another} left of the {name}?", "No."),
        ):
            asked += 1
            right += demo_server.ask(picture, question) == answer
        which = demo_server.ask(draw(*one), draw(*other), f"Which picture shows a {another}?")
        asked += 1
        right += which == "Picture 2."
    assert asked == 60
    assert right >= 48
