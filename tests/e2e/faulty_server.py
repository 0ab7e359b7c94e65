"""``python -m tests.e2e.faulty_server FLAGS FILE``: the server, with an engine that fails as FILE
says (tests.e2e.faulty_engine)."""

import asyncio
import sys
from typing import Any, NoReturn

import engine.client
from server.cli import main

*flags, file = sys.argv[1:]


class FaultyEngine(engine.client.ProcessEngine):
    """Watched only while it is at work: on a busy machine nobody knows how long loading takes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        command = [sys.executable, "-m", "tests.e2e.faulty_engine", file]
        super().__init__(*args, command=command, stop_timeout=0.5, **options)

    async def _watch(self) -> NoReturn:
        while self.state == "starting":
            await asyncio.sleep(0.1)
        await super()._watch()


engine.client.ProcessEngine = FaultyEngine  # type: ignore[misc]
sys.exit(main(["serve", *flags]))
