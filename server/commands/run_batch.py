"""``internvl run-batch``: a file of requests, answered into another file."""

import argparse
import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from server.commands.asking import add_target, asked
from server.flags import some
from wire.logs import say
from wire.settings import SettingError

if TYPE_CHECKING:
    from server.batch.board import Board
    from server.batch.lines import Item
    from server.batch.output import Output
    from server.target import Target

EXIT_FAILED, EXIT_UNFINISHED = 1, 3


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "run-batch",
        help="answer a file of requests",
        description="Answer a file of requests in the form of OpenAI's batch API. What the output "
        "holds already is not asked again, so the same command goes on after an interruption. "
        "Ends with 0 if all lines were answered, with 1 if some failed, with 3 if some are left.",
    )
    parser.add_argument(
        *("-i", "--input"), required=True, metavar="FILE", help="the requests; - for a pipe"
    )
    parser.add_argument(
        *("-o", "--output"), type=Path, required=True, metavar="FILE", help="added to"
    )
    parser.add_argument(
        "--concurrency", type=some, default=32, metavar="N", help="requests at once [32]"
    )
    parser.add_argument(
        "--patience",
        type=some,
        default=600,
        metavar="SECONDS",
        help="how long a request is tried again that is refused for now [600]",
    )
    parser.add_argument(
        "--timeout", type=some, default=3600, metavar="SECONDS", help="for one answer [3600]"
    )
    add_target(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Answer it. Raises SettingError, and server.target.Unreachable."""
    from server.batch.board import Board
    from server.batch.lines import read_lines
    from server.batch.output import Output

    source = _open(options.input)
    known = os.fstat(source.fileno())
    output = Output(options.output)
    if os.path.samestat(known, options.output.stat()):
        raise SettingError("--output: it is the input too")
    if output.cut:
        say(f"run-batch: the last line of {options.output} was torn off, and is done again")
    board = Board(known.st_size or None)
    left = output.left(read_lines(source), board.skip)
    try:
        first = next(left, None)
    except OSError as error:
        raise SettingError(f"--input: {options.input}: {error.strerror}") from None
    complete = True
    if first is not None:  # or there is no need of a server
        with asked(options) as target:
            board.start()
            complete = _answer(options, itertools.chain([first], left), target, output, board)
    output.close()
    return _tell(board, output, complete=complete)


def _open(name: str) -> BinaryIO:
    try:
        return open(0, "rb", closefd=False) if name == "-" else open(name, "rb")
    except OSError as error:
        raise SettingError(f"--input: {name}: {error.strerror}") from None


def _answer(
    options: argparse.Namespace,
    items: "Iterator[Item]",
    target: "Target",
    output: "Output",
    board: "Board",
) -> bool:
    import asyncio

    from server.batch.runner import Runner

    async def go() -> bool:
        runner = Runner(
            target, output, board, options.concurrency, options.patience, options.timeout
        )
        main = asyncio.current_task()
        signals = 0

        def stop() -> None:
            nonlocal signals
            signals += 1
            if signals > 1 and main is not None:
                main.cancel()
                return
            say("run-batch: finishing what is running; once more to stop at once")
            runner.stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        try:
            return await runner.run(items)
        finally:
            board.close()
            if runner.trouble:
                say(f"run-batch: {runner.trouble}")

    try:
        return asyncio.run(go())
    except asyncio.CancelledError:
        return False


def _tell(board: "Board", output: "Output", *, complete: bool) -> int:
    before = f", {board.skipped} done before" if board.skipped else ""
    say(
        f"run-batch: {board.answered} answered, {board.failed} failed{before}; "
        f"{board.tokens} tokens in {time.monotonic() - board.began:.1f} s"
    )
    if not complete:
        say("run-batch: some lines are left; the same command goes on with them")
        return EXIT_UNFINISHED
    return EXIT_FAILED if board.failed or output.failed else 0
