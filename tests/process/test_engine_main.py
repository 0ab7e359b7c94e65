"""``python -m engine`` with a real, tiny model."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from engine.client import ProcessEngine
from tests.checkpoints import IMAGE_TOKEN, Shape, make_checkpoint
from wire.errors import Unavailable
from wire.messages import EngineRequest, VisionItem
from wire.sampling import SamplingParams
from wire.settings import EngineSettings

DEADLINE = 240.0
SHAPE = Shape()


def request(name: str, max_tokens: int = 900) -> tuple[EngineRequest, list[bytes]]:
    prompt = [5, 6, 7] + [IMAGE_TOKEN] * SHAPE.tokens_per_tile + [8]
    item = VisionItem(b"a picture", 3, SHAPE.tokens_per_tile, 1, 0)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return EngineRequest(name, prompt, sampling, [item]), [bytes(range(3)) * SHAPE.tile_size**2]


async def tokens(client: ProcessEngine, name: str) -> list[int]:
    return [t async for output in client.submit(*request(name)) for t in output.token_ids]


async def test_a_model_is_served_killed_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", shape=SHAPE)
    # Whatever lies in the working folder must not be taken for the engine.
    (tmp_path / "engine.py").write_text("raise SystemExit('the wrong engine')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    settings = EngineSettings(model=str(folder), device="cpu", threads=1, num_kv_blocks=64)
    client = ProcessEngine(settings)
    await client.start()
    try:
        ready = await asyncio.wait_for(client.wait_ready(), DEADLINE)
        assert ready.blocks_total == 64
        assert ready.geometry.tokens_per_tile == SHAPE.tokens_per_tile
        assert ready.vision_token_bytes == SHAPE.size * 4
        whole = await asyncio.wait_for(tokens(client, "whole"), DEADLINE)
        broken = asyncio.create_task(tokens(client, "broken"))
        steps = client.stats.steps
        async with asyncio.timeout(DEADLINE):
            while client.stats.steps < steps + 3:
                await asyncio.sleep(0)
        assert not broken.done()
        os.kill(client.pid or 0, signal.SIGKILL)
        assert await asyncio.wait_for(broken, DEADLINE) == whole
        assert client.restarts == 1
    finally:
        await asyncio.wait_for(client.stop(), DEADLINE)


async def test_a_folder_without_a_checkpoint_fails_with_a_reason_for_the_operator(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    client = ProcessEngine(EngineSettings(model=str(tmp_path)))
    await client.start()
    try:
        with pytest.raises(Unavailable) as caught:
            await asyncio.wait_for(client.wait_ready(), DEADLINE)
        assert str(tmp_path) not in str(caught.value)
        assert client.failure is not None
        assert client.failure.startswith("load: CheckpointError: ")
        told = capfd.readouterr().err
        assert "the engine fails" in told
        assert "Traceback" not in told
    finally:
        await client.stop()
