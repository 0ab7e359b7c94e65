"""The network below a fetch: connections that are read a little at a time and metered.

A hostile server can send protocol without content for ever: interim answers, chunks of one byte,
headers. Each costs this process far more than it costs the sender, so their share is bounded.
"""

# ruff: noqa: ASYNC109 - httpcore gives its backends their timeouts

from collections.abc import Iterable
from ssl import SSLContext
from typing import Any

import httpcore

_READ = 16 << 10  # bytes parsed before other tasks get their turn
_PLAIN = 256 << 10  # likewise where nothing is parsed; asyncio takes no more from a socket
_FRAMING = (
    128 << 10
)  # bytes of protocol that every answer may have; httpcore's own header limit fits


class MeteredNetwork(httpcore.AsyncNetworkBackend):
    """Makes the connections of one answer; whoever reads it adds to ``content``, and closes."""

    def __init__(self) -> None:
        self._network = httpcore.AnyIOBackend()
        self._streams: list[httpcore.AsyncNetworkStream] = []
        self._received = 0
        self._plain = False
        self.content = 0

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Dial, as httpcore asks for it."""
        stream = await self._network.connect_tcp(host, port, timeout, local_address, socket_options)
        self._streams.append(stream)
        return _MeteredStream(stream, self)

    async def aclose(self) -> None:
        """Close everything that was dialled: httpcore forgets a handshake that is cancelled."""
        for stream in self._streams:
            await stream.aclose()

    def expect_content_alone(self) -> None:
        """What comes next is content of a length that the head has told: nothing in it costs more
        than its bytes."""
        self._plain = True

    @property
    def most(self) -> int:
        """Bytes to read at once."""
        return _PLAIN if self._plain else _READ

    def count(self, size: int) -> None:
        """Note what was read. Raises RemoteProtocolError when too little of it is content."""
        if self._plain:
            return
        self._received += size
        if self._received - self.content > _FRAMING + self.content // 16:
            raise httpcore.RemoteProtocolError("more protocol than content")


class _MeteredStream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: httpcore.AsyncNetworkStream, network: MeteredNetwork) -> None:
        self._stream = stream
        self._network = network

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        # httpcore asks for 64 KiB and takes more: to cut what the socket gave costs the most.
        data = await self._stream.read(self._network.most, timeout)
        self._network.count(len(data))
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._stream.start_tls(ssl_context, server_hostname, timeout)
        return _MeteredStream(stream, self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
