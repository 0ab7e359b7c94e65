"""Where the processes of other hosts come in, before an engine that they are part of is loaded.

Anybody can knock: only who proves to know the secret gets a place (``wire.handshake``), and until
then takes nothing but a connection, which is dropped when it is slow or when there are too many.
Who has a place keeps it for as long as the connection lives, or until the same comes once more.
"""

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable
from typing import NamedTuple

from engine.network import keep_alive, listen
from engine.orders import Refusal
from wire import handshake
from wire.channel import frame
from wire.errors import Unservable
from wire.handshake import Offer, read_secret
from wire.messages import Progress
from wire.settings import EngineSettings

logger = logging.getLogger(__name__)

# Seconds in which a proof must be there, and connections without one at a time.
_PATIENCE = 10.0
_STRANGERS = 128
_BACKLOG = 128


class RanksMissing(Unservable):
    """Not all processes of other hosts came."""


class Place(NamedTuple):
    """One of a host's processes, both counted from 0 on; the leader is (0, 0)."""

    node: int
    process: int


def gather(
    settings: EngineSettings, progress: Callable[[Progress], None]
) -> dict[Place, socket.socket]:
    """A connection to each process of the other hosts. Raises RanksMissing."""
    return asyncio.run(_Door(settings).gather(progress))


class _Door:
    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._secret = read_secret(settings.rank_secret_file)
        self._each = settings.processes // settings.nodes
        self._places = [
            Place(node, index) for node in range(1, settings.nodes) for index in range(self._each)
        ]
        self._strangers: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._taken: dict[Place, tuple[asyncio.Task[None], socket.socket]] = {}
        self._came = asyncio.Event()
        self._warned = False

    async def gather(self, progress: Callable[[Progress], None]) -> dict[Place, socket.socket]:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.rank_timeout
        with self._listen() as listener:
            accepting = asyncio.create_task(self._accept(listener))
            try:
                while len(self._taken) < len(self._places):
                    progress(Progress("processes", len(self._taken), len(self._places)))
                    if loop.time() >= end:
                        raise RanksMissing(self._missing())
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._came.wait(), 1.0)
                    self._came.clear()
                return {place: sock.dup() for place, (_, sock) in self._taken.items()}
            finally:
                tasks = [accepting, *self._strangers, *(task for task, _ in self._taken.values())]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _listen(self) -> socket.socket:
        host, port = self._settings.rank_host, self._settings.rank_port
        try:
            listener = listen(host, port, _BACKLOG)
        except OSError as error:
            why = error.strerror or error
            raise RanksMissing(f"rank_host {host}, rank_port {port}: {why}") from None
        listener.setblocking(False)
        logger.info("%d processes of other hosts are awaited on port %d", len(self._places), port)
        return listener

    def _missing(self) -> str:
        missing = [place for place in self._places if place not in self._taken]
        return (
            f"{len(missing)} of {len(self._places)} processes of other hosts did not come within "
            f"{self._settings.rank_timeout:g} seconds (rank_timeout): "
            + ", ".join(map(_name, missing))
        )

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listener)
            except OSError as error:  # too many files are open, or who knocked has left
                logger.warning("nobody can come in: %s", error.strerror)
                await asyncio.sleep(0.1)
                continue
            if len(self._strangers) == _STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.cancel()
            task = asyncio.create_task(self._attend(sock, address[0]))
            self._strangers[task] = None
            # Also of a task that is cancelled before it begins.
            task.add_done_callback(functools.partial(self._close, sock))
            # While others wait at the door, accepting one does not wait for anything.
            await asyncio.sleep(0)

    async def _attend(self, sock: socket.socket, address: str) -> None:
        """A connection, until it is lost or everybody is here."""
        task = asyncio.current_task()
        assert task is not None
        try:
            keep_alive(sock)
            async with asyncio.timeout(_PATIENCE):
                place = await self._admit(sock, address)
            if place is not None:
                logger.info("%s has come from %s", _name(place), address)
                self._strangers.pop(task, None)
                await self._hold(place, task, sock)
        except (OSError, TimeoutError, EOFError) as error:
            logger.debug("%s has left: %r", address, error)

    def _close(self, sock: socket.socket, task: "asyncio.Task[None]") -> None:
        self._strangers.pop(task, None)
        sock.close()

    async def _hold(self, place: Place, task: "asyncio.Task[None]", sock: socket.socket) -> None:
        """Keep a place for a process until it leaves, or comes once more."""
        if place in self._taken:
            self._taken[place][0].cancel()
        self._taken[place] = task, sock
        self._came.set()
        try:
            # It says nothing before it is asked: whatever comes is its end.
            await asyncio.get_running_loop().sock_recv(sock, 1)
        finally:
            if self._taken[place][0] is task:
                del self._taken[place]

    async def _admit(self, sock: socket.socket, address: str) -> Place | None:
        loop, challenged = asyncio.get_running_loop(), handshake.challenge()
        await loop.sock_sendall(sock, challenged)
        called = b""
        while len(called) < handshake.CALL:
            piece = await loop.sock_recv(sock, handshake.CALL - len(called))
            if not piece:
                raise EOFError
            called += piece
        offer = handshake.hear(self._secret, challenged, called)
        if offer is None:
            if not self._warned:  # once: whoever wants to could fill the log
                logger.warning("%s came and does not know the secret", address)
            self._warned = True
            return None
        await loop.sock_sendall(sock, handshake.answer(self._secret, challenged, called))
        why = self._objection(offer)
        if why is None:
            return Place(offer.node, offer.process)
        logger.error("a process of node %d from %s is refused: %s", offer.node, address, why)
        await loop.sock_sendall(sock, b"".join(frame(Refusal(why))))
        return None

    def _objection(self, offer: Offer) -> str | None:
        if offer.version != handshake.version():
            return f"it is version {offer.version}, and the leader is {handshake.version()}"
        if offer.processes != self._each:
            return (
                f"its host runs {offer.processes} processes, and the leader asks for {self._each}"
            )
        if Place(offer.node, offer.process) not in self._places:
            return f"there is no node {offer.node} among {self._settings.nodes}, counted from 0"
        return None


def _name(place: Place) -> str:
    return f"process {place.process} of node {place.node}"
