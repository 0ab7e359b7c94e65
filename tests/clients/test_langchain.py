"""LangChain's standard suite for chat models, as it is, over each of the three dialects."""

from typing import Any

import httpx
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, chat_models

from tests.clients.asking import CIRCLE, ENDS, KEY, MODEL, TOO_LONG, WHAT, base64_of, png
from tests.servers import Server

UNTAUGHT = {
    "test_tool_calling": "the demo model does not copy a number that it was not taught",
    "test_tool_calling_async": "the same",
    "test_agent_loop": "it calls get_weather as it was taught, with a city",
    "test_unicode_tool_call_integration": "it has no Chinese",
}
# Sent to /v1/messages these are demanded calls, which have the right keys.
UNTAUGHT_KEYS = {
    "test_json_mode": "it does not know which keys are asked for",
    "test_structured_output_pydantic_2_v1": "the schema allows other keys, and the model adds one",
}


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite fetches one picture from elsewhere; it gets one of ours."""

    def get(url: str, **_: Any) -> httpx.Response:
        assert url.endswith(".png")
        return httpx.Response(200, content=png("red", "circle"))

    monkeypatch.setattr(chat_models.httpx, "get", get)


@pytest.fixture(autouse=True)
def untaught(request: pytest.FixtureRequest) -> None:
    untaught = UNTAUGHT if request.cls is TestMessages else UNTAUGHT | UNTAUGHT_KEYS
    reason = untaught.get(request.function.__name__)
    if reason:
        # Not strict: another processor's last bits may let the model say what it was not taught.
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))


@pytest.fixture(scope="class", autouse=True)
def address(request: pytest.FixtureRequest, server: Server) -> None:
    if request.cls:
        request.cls.address = server.url


class Suite(ChatModelIntegrationTests):
    address = ""
    supports_image_inputs = True
    supports_image_tool_message = True
    supports_json_mode = True
    supports_anthropic_inputs = True
    supports_model_override = True
    model_override_value = MODEL
    # The suite's address is on the internet; for the rest see test_a_picture_...
    supports_image_urls = False


class TestChatCompletions(Suite):
    chat_model_class = ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "base_url": self.address + "/v1",
            "api_key": KEY,
            "temperature": 0,
            "max_tokens": 400,
            "max_retries": 0,
            "stream_usage": True,
            "extra_body": ENDS,
        }


class TestResponses(TestChatCompletions):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return super().chat_model_params | {"use_responses_api": True}


class TestMessages(Suite):
    chat_model_class = ChatAnthropic

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "base_url": self.address,
            "api_key": KEY,
            "temperature": 0,
            "max_tokens": 400,
            "max_retries": 0,
            "model_kwargs": {"extra_body": ENDS},
        }


@pytest.mark.parametrize("kind", [TestChatCompletions, TestResponses, TestMessages])
def test_a_picture_is_seen_and_what_is_too_long_is_known_as_that(kind: Any, server: Server) -> None:
    suite = kind()
    suite.address = server.url
    model = suite.chat_model_class(**suite.chat_model_params)
    shown = {"type": "image", "base64": base64_of("red", "circle"), "mime_type": "image/png"}
    asked = HumanMessage([shown, {"type": "text", "text": WHAT}])
    assert model.invoke([asked]).text == CIRCLE
    chunks = list(model.stream([asked]))
    assert "".join(chunk.text for chunk in chunks) == CIRCLE
    assert len([chunk for chunk in chunks if chunk.text]) > 1
    with pytest.raises(ContextOverflowError):
        model.invoke(TOO_LONG)


def test_embeddings_are_refused_clearly(server: Server) -> None:
    embeddings = OpenAIEmbeddings(
        base_url=server.url + "/v1", api_key=KEY, model=MODEL, check_embedding_ctx_length=False
    )
    with pytest.raises(Exception, match="no POST route"):
        embeddings.embed_query("x")
