"""The application over ASGI with a scripted engine."""

import asyncio
import contextlib
import dataclasses
import functools
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI

from server.app import create_app
from server.lifecycle import Service
from server.limits import Clock
from server.run import BoundedHttp
from tests import small_tokenizer
from tests.fake_engine import FakeEngine, FakeMedia
from wire.settings import (
    CriticSettings,
    EngineSettings,
    MediaSettings,
    ServerSettings,
    Settings,
    TracingSettings,
)


@dataclasses.dataclass
class House:
    """An application and everything a test wants to reach in it."""

    app: FastAPI
    engine: FakeEngine
    media: FakeMedia
    http: httpx.AsyncClient
    sdk: AsyncOpenAI

    @property
    def service(self) -> Service:
        return self.app.state.service

    async def ask(self, **body: Any) -> httpx.Response:
        """POST a chat request; one short user message unless the test gives others."""
        body = {"messages": [{"role": "user", "content": "Hello!"}]} | body
        return await self.http.post("/v1/chat/completions", json=body)


class Houses:
    """Makes applications and ends them after the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = small_tokenizer.save(folder / "tiny")
        self._open: list[House] = []

    async def open(
        self,
        engine: FakeEngine | None = None,
        *,
        wait: bool = True,
        policy: str = "fcfs",
        request_tile_bytes: int = 1 << 20,
        clock: Clock = time.monotonic,
        critic: FakeEngine | None = None,
        tracing: TracingSettings | None = None,
        **server: Any,
    ) -> House:
        settings = Settings(
            ServerSettings(served_model_name="tiny", **server),
            MediaSettings(max_images=4, media_workers=1),
            EngineSettings(
                model=str(self.folder),
                scheduling_policy=policy,
                request_tile_bytes=request_tile_bytes,
            ),
            CriticSettings(critic_model=str(self.folder), critic_max_steps=3),
            tracing or TracingSettings(),
        )
        engine = engine or FakeEngine()
        media = FakeMedia()
        app = create_app(settings, engine, media, clock, critic)
        house = House(
            app,
            engine,
            media,
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server"),
            AsyncOpenAI(
                base_url="http://server/v1",
                api_key="key",
                max_retries=0,
                http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(app)),
            ),
        )
        self._open.append(house)
        await house.service.start()
        if wait:
            await house.service.settled.wait()
        return house

    async def close(self) -> None:
        for house in self._open:
            await house.http.aclose()
            await house.sdk.close()
            await house.service.stop()
            if house.app.state.tracing is not None:
                await house.app.state.tracing.close()


@contextlib.asynccontextmanager
async def listening(house: House) -> AsyncIterator[int]:
    """The application behind a real socket, as the server serves it; yields the port."""
    config = uvicorn.Config(
        house.app,
        http=functools.partial(
            BoundedHttp, head_timeout=house.service.settings.server.head_timeout
        ),  # type: ignore[arg-type]
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as door:
        task = asyncio.ensure_future(server._serve([door]))
        yield door.getsockname()[1]
        server.should_exit = True
        await task


@pytest.fixture
async def houses(tmp_path: Path) -> AsyncIterator[Houses]:
    made = Houses(tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def house(houses: Houses) -> House:
    return await houses.open()
