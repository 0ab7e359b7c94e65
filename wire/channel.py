"""Framed messages over a connected stream socket, with a blocking and an asyncio end.

A frame is a header (payload bytes as u32, number of buffers as u32, little endian), the msgspec
payload, then each raw buffer behind its u64 length. Payloads are decoded into the declared type
only: whatever a peer sends, nothing but that type comes out, so a compromised peer can send
wrong data but never code. A peer's death is its socket's end of file: it ends ``receive`` at
once with ``ChannelClosed``, and no heartbeat is needed.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

Buffer = bytes | bytearray | memoryview

_HEADER = struct.Struct("<II")
_LENGTH = struct.Struct("<Q")
DEFAULT_LIMIT = 1 << 30
_PIECE = 1 << 20  # bytes handed to asyncio at a time: it copies what the peer has not read yet


class ChannelClosed(Exception):
    """The peer is gone, or sent something that is not a frame of the agreed type."""


class Bounds(NamedTuple):
    """What one incoming frame may have at most: bytes of its message, buffers, bytes of all."""

    message: int
    buffers: int
    total: int


_encoder = msgspec.msgpack.Encoder()


def frame(message: object, buffers: Sequence[Buffer] = ()) -> list[Buffer]:
    """One message and its buffers, in the pieces that are written one after the other."""
    payload = _encoder.encode(message)
    pieces: list[Buffer] = [_HEADER.pack(len(payload), len(buffers)) + payload]
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        pieces += [_LENGTH.pack(view.nbytes), view]
    return pieces


class _Codec(Generic[T]):
    def __init__(self, receives: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(receives)

    def check(self, number: int, limit: int) -> None:
        if number > limit:
            raise ChannelClosed("a frame is larger than this channel allows")

    def decode(self, payload: Buffer) -> T:
        try:
            return self._decoder.decode(payload)
        except msgspec.DecodeError:  # ValidationError is one of these; it quotes what the peer sent
            raise ChannelClosed("not a message of this channel") from None


class Channel(Generic[T]):
    """The blocking end. ``receives`` is the type (or union) of incoming messages.

    ``send`` may be called from several threads; ``receive`` from one. ``limit`` bounds the bytes
    of one incoming frame, buffers included.
    """

    def __init__(self, sock: socket.socket, receives: Any, limit: int = DEFAULT_LIMIT) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._codec: _Codec[T] = _Codec(receives)
        self._limit = limit
        self._lock = threading.Lock()

    def send(self, message: object, buffers: Sequence[Buffer] = ()) -> None:
        """Write one message and its buffers. Raises ChannelClosed when the peer is gone."""
        self.write(frame(message, buffers))

    def write(self, pieces: Sequence[Buffer]) -> None:
        """Write a message that ``frame`` has made, as ``send`` does."""
        try:
            with self._lock:
                for piece in pieces:
                    self._sock.sendall(piece)
        except OSError as error:
            raise ChannelClosed("the peer is gone") from error

    def receive(self) -> tuple[T, list[bytearray]]:
        """Block for the next message and its buffers. Raises ChannelClosed at end of file."""
        size, count = _HEADER.unpack(self._read(_HEADER.size))
        total = size
        self._codec.check(total, self._limit)
        payload = self._read(size)
        buffers = []
        for _ in range(count):
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            total += length + _LENGTH.size
            self._codec.check(total, self._limit)
            buffers.append(self._read(length))
        return self._codec.decode(payload), buffers

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view.nbytes:
            try:
                read = self._sock.recv_into(view)
            except OSError as error:
                raise ChannelClosed("the peer is gone") from error
            if read == 0:
                raise ChannelClosed("the peer closed the channel")
            view = view[read:]
        return data

    def close(self) -> None:
        """Close the socket; a ``receive`` blocked in another thread ends with ChannelClosed."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class AsyncChannel(Generic[T]):
    """The asyncio end; same frames. Open it with ``await AsyncChannel.open(sock, type)``."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        receives: Any,
        limit: int,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._codec: _Codec[T] = _Codec(receives)
        self._most = Bounds(limit, limit, limit)
        self._lock = asyncio.Lock()

    @classmethod
    async def open(
        cls, sock: socket.socket, receives: Any, limit: int = DEFAULT_LIMIT
    ) -> "AsyncChannel[T]":
        """Wrap a connected socket; it belongs to the channel from now on."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 20)
        return cls(reader, writer, receives, limit)

    async def send(self, message: object, buffers: Sequence[Buffer] = ()) -> None:
        """Write one message and its buffers; waits while the peer does not keep up."""
        pieces = frame(message, buffers)
        try:
            async with self._lock:
                for piece in pieces:
                    view = memoryview(piece)
                    for at in range(0, len(view), _PIECE):
                        self._writer.write(view[at : at + _PIECE])
                        await self._writer.drain()
        except (OSError, RuntimeError) as error:
            raise ChannelClosed("the peer is gone") from error

    async def receive(self, most: Bounds | None = None) -> tuple[T, list[bytes]]:
        """Wait for the next message and its buffers; ``most`` bounds this frame in place of the
        channel's own limit. Raises ChannelClosed at end of file."""
        most = most or self._most
        try:
            size, count = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            total = size
            self._codec.check(size, most.message)
            self._codec.check(count, most.buffers)
            payload = await self._reader.readexactly(size)
            buffers = []
            for _ in range(count):
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                total += length + _LENGTH.size
                self._codec.check(total, most.total)
                buffers.append(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelClosed("the peer closed the channel") from error
        return self._codec.decode(payload), buffers

    def close(self) -> None:
        """Close the socket without waiting for unsent bytes."""
        self._writer.transport.abort()
