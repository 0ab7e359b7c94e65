"""What a batch says of its lines where the disk is full."""

import asyncio
import errno
import threading
from collections.abc import Iterable, Iterator
from typing import cast

from server.batch.board import Board
from server.batch.lines import Item, Misfit
from server.batch.output import Output
from server.batch.runner import Runner
from server.target import Target

HURRY = 10.0
"""Seconds that nobody waits for unless something is wrong."""


class Disk:
    """Takes two writes: the first when four more lines wait, the second when others came."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self.writes = 0
        self.waiting, self.behind = threading.Event(), threading.Event()
        self.second = threading.Event()

    def write(self, lines: Iterable[bytes]) -> None:
        self.writes += 1
        if self.writes == 1:
            assert self.waiting.wait(HURRY)
        elif self.writes == 2:
            self.second.set()
            assert self.behind.wait(HURRY)
        else:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.kept += lines


def test_a_line_that_is_on_the_disk_is_counted_whatever_becomes_of_those_behind_it() -> None:
    disk, board = Disk(), Board(None)

    def items() -> Iterator[Item]:
        for number in range(8):
            yield Misfit(number, 1, None, "is none")
        disk.waiting.set()
        assert disk.second.wait(HURRY)
        for number in range(8, 16):
            yield Misfit(number, 1, None, "is none")
        disk.behind.set()

    async def run() -> Runner:
        runner = Runner(Target("http://127.0.0.1:9"), cast(Output, disk), board, 32, 1.0, 1.0)
        await runner.run(items())
        return runner

    runner = asyncio.run(run())
    assert runner.trouble == "the output cannot be written: No space left on device"
    assert 1 < len(disk.kept) == board.failed < 16
