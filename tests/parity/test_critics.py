"""Critics of best_of, over sockets: their scores equal what transformers' own model makes of the
same weights, the same pictures and the prompt that the authors' code would write."""

import base64
import dataclasses
import io
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from server.chat.critic import SYSTEM
from tests.checkpoints import Shape, make_checkpoint
from tests.parity.reference import Reference
from tests.parity.test_transformers import TOLERANCE
from tests.servers import Server
from tests.small_tokenizer import encode_rendered

# The critic's prompt is long in so small a vocabulary. Its layout is VisualPRM's: the original
# format around InternLM2.
MODEL = Shape(positions=2048)
CRITIC = Shape(
    backbone="InternLM2ForCausalLM", text_bias=False, heads=8, kv_heads=2, head_dim=8,
    tile_size=84, image_size=84, positions=4096,
)  # fmt: skip
QUESTION = "What is in this picture?"
RIGHT, WRONG = encode_rendered("+")[0], encode_rendered("-")[0]
FORM = "[a-z ]{4,12}\n\n[a-z ]{4,12}\n\n[a-z]{2,9}"
COUNT = 4


@dataclasses.dataclass
class Court:
    """A server with a critic, and both models as transformers has them."""

    server: Server
    model: Reference
    critic: Reference

    def ask(self, **body: Any) -> dict[str, Any]:
        url = self.server.url + "/v1/chat/completions"
        answer = httpx.post(url, json=asked() | body, timeout=60)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture(scope="module")
def court(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Court]:
    folder = tmp_path_factory.mktemp("court")
    model = make_checkpoint(folder / "model", shape=MODEL)
    critic = make_checkpoint(folder / "critic", format="chat", shape=CRITIC, seed=7)
    twin = dataclasses.replace(CRITIC, backbone="LlamaForCausalLM")
    reference = make_checkpoint(folder / "reference", shape=twin, seed=7)
    flags = ["--model", str(model), "--critic-model", str(critic), "--dtype", "float32"]
    # Less than any prompt of the critic's, which is computed in pieces then.
    flags += ["--max-num-batched-tokens", "200", "--num-kv-blocks", "400"]
    server = Server(folder / "log", flags)
    yield Court(server, Reference(model), Reference(reference))
    server.close()


def pixels() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def asked() -> dict[str, Any]:
    data = io.BytesIO()
    Image.fromarray(pixels()).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    parts = [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 1.0, "seed": 5}


def tile(side: int) -> Tensor:
    """The picture as the one tile that it is at either size."""
    shown = Image.fromarray(pixels()).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None]


def judged(critic: Reference, answer: str) -> list[float]:
    """The share of "+" behind each beginning of the assistant's turn, in one pass over the whole
    conversation."""
    picture = "<img>" + "<IMG_CONTEXT>" * CRITIC.tokens_per_tile + "</img>\n"
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    before = f"### Question:\n{picture}{QUESTION}\n\n### Solution Process:\n"
    for step in answer.strip().split("\n\n"):
        text += f"<|im_start|>user\n{before}{step}<|im_end|>\n<|im_start|>assistant\n+<|im_end|>\n"
        before = ""
    ids = encode_rendered(text)
    target = encode_rendered("<|im_start|>assistant\n+<|im_end|>")
    size = len(target)
    at = [i + size - 3 for i in range(len(ids)) if ids[i : i + size] == target]
    both = critic.logits(ids, tile(CRITIC.tile_size))[at][:, [RIGHT, WRONG]]
    found: list[float] = both.double().softmax(-1)[:, 0].tolist()
    return found


def test_scores_of_steps_are_the_references(court: Court) -> None:
    best = {"n": COUNT, "critic": "visualprm", "return_texts": True}
    whole = court.ask(best_of=best, structured_outputs={"regex": FORM})
    candidates = whole["best_of"]["candidates"]
    assert len({one["content"] for one in candidates}) == COUNT
    for one in candidates:
        assert re.fullmatch(FORM, one["content"])
        expected = judged(court.critic, one["content"])
        assert len(expected) == 3
        assert one["steps"] == pytest.approx(expected, abs=TOLERANCE)
        assert one["score"] == pytest.approx(sum(expected) / 3, abs=TOLERANCE)
    scores = [one["score"] for one in candidates]
    # Else the test would say little.
    assert max(scores) - min(scores) > 100 * TOLERANCE
    winner = whole["best_of"]["winner"]
    assert winner == scores.index(max(scores))
    assert whole["choices"][0]["message"]["content"] == candidates[winner]["content"]
    usage = whole["usage"]["best_of"]
    # All but the first find the words of the system, the picture and the question in the cache.
    shared = len(encode_rendered(SYSTEM)) + CRITIC.tokens_per_tile
    assert usage["critic_cached_tokens"] >= (COUNT - 1) * (shared - shared % 16)
    assert usage["shared_tokens"] >= (COUNT - 1) * 16


def test_mean_log_probabilities_are_the_references(court: Court) -> None:
    length = {"max_tokens": 12, "temperature": 0.7, "top_p": 0.9}
    whole = court.ask(best_of={"n": COUNT, "critic": "logprob"}, **length)
    found = []
    for index, one in enumerate(whole["best_of"]["candidates"]):
        # As a request of its own it is the same.
        alone = court.ask(seed=5 + index, return_token_ids=True, **length)
        prompt, tokens = alone["prompt_token_ids"], alone["choices"][0]["token_ids"]
        logits = court.model.logits(prompt + tokens, tile(MODEL.tile_size))
        likely = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
        own = likely.gather(-1, torch.tensor(tokens)[:, None])
        found.append(own.mean().item())
        assert one["completion_tokens"] == len(tokens)
        assert one["score"] == pytest.approx(found[-1], abs=TOLERANCE)
        if index == whole["best_of"]["winner"]:
            content = alone["choices"][0]["message"]["content"]
            assert whole["choices"][0]["message"]["content"] == content
    assert whole["best_of"]["winner"] == found.index(max(found))
    again = court.ask(best_of={"n": COUNT}, **length)
    assert again["choices"] == whole["choices"]
    assert again["best_of"]["winner"] == whole["best_of"]["winner"]


def test_the_picture_of_all_candidates_is_encoded_once(court: Court) -> None:
    before = court.server.metric("internvl_encoded_tiles_total")
    assert before is not None
    body = asked()
    body["messages"][0]["content"][0]["text"] = "Another question?"
    body["messages"][0]["content"][1]["image_url"]["url"] = _noise(8)
    whole = court.ask(**body, best_of={"n": COUNT, "critic": "vote"}, max_tokens=4)
    assert court.server.metric("internvl_encoded_tiles_total") == before + 1
    assert len(whole["best_of"]["candidates"]) == COUNT


def _noise(seed: int) -> str:
    values = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(values).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def test_a_critic_that_dies_is_started_again_and_says_the_same(court: Court) -> None:
    body = {"best_of": {"n": 2, "critic": "visualprm"}, "max_tokens": 8}
    generated = "internvl_generation_tokens_total"
    before = court.server.metric(generated)
    expected = court.ask(**body)["best_of"]
    after = court.server.metric(generated)
    assert before is not None
    assert after is not None
    first, critic = sorted(court.server.children("engine"))
    os.kill(critic, signal.SIGSTOP)
    found: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: found.append(court.ask(**body)))
    asking.start()
    try:
        court.server.wait_for_metric(generated, 2 * after - before)
        # The candidates are there, and the critic, which cannot answer, has them to judge.
        assert not found
    finally:
        os.kill(critic, signal.SIGKILL)
        asking.join(60)
    assert found[0]["best_of"]["winner"] == expected["winner"]
    for one, other in zip(found[0]["best_of"]["candidates"], expected["candidates"], strict=True):
        assert one["steps"] == pytest.approx(other["steps"], abs=TOLERANCE)
    assert court.server.metric("internvl_critic_restarts_total") == 1
    assert court.server.metric("internvl_engine_restarts_total") == 0
    log = court.server.log.read_text()
    assert "critic: 0." in log
    assert "the critic is gone" in log
    assert first in court.server.children("engine")
