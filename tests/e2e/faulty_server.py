"""``python -m tests.e2e.faulty_server FLAGS FILE``: the server, with an engine that fails as FILE
says (tests.e2e.faulty_engine)."""

import functools
import sys

import engine.client
from server.cli import main

*flags, file = sys.argv[1:]
engine.client.ProcessEngine = functools.partial(  # type: ignore[misc, assignment]
    engine.client.ProcessEngine,
    command=[sys.executable, "-m", "tests.e2e.faulty_engine", file],
    stop_timeout=0.5,
)
sys.exit(main(["serve", *flags]))
