"""Turn the URL of a part into encoded bytes: the only place that opens a connection for a client.

The pipeline calls ``Fetcher.fetch``; nothing else in the server may fetch a client's URL. A URL
is parsed once and the parsed object is what is checked and dialled. A name is resolved once,
all its addresses are checked, and the checked address itself is dialled, so nothing can change
between check and use. Every redirect passes the same gate. Refusals name the part; they never
hold an address, a path or a library's text. All that can go wrong once an address is dialled is
one refusal to the client, who could map a network by the differences; the log says which it was.
"""

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import os
import re
import socket
import ssl
import zlib
from collections.abc import AsyncIterator

import httpcore
import httpx
import pybase64

from preprocessing.addresses import is_public, is_public_host
from preprocessing.allowance import Allowance
from preprocessing.budget import Share
from preprocessing.connections import MeteredNetwork
from preprocessing.incoming import Incoming
from preprocessing.local_files import read_file
from preprocessing.media import File, Kind, Source
from wire.errors import MediaRefused
from wire.settings import MediaSettings, SettingError

MAX_REDIRECTS = 3
MAX_ADDRESSES = 16  # of a name that are dialled: it may have thousands, all of them somebody else's
MAX_URL = 8192  # characters of an http(s) or file URL
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = {301, 302, 303, 307, 308}
_TYPES: dict[Kind, str] = {
    "image": "image/[a-z0-9.+-]+|application/octet-stream",
    "video": "video/[a-z0-9.+-]+|image/gif|image/webp|application/octet-stream",
}
_DATA = {
    kind: re.compile(f"data:(?:{types});base64,", re.IGNORECASE) for kind, types in _TYPES.items()
}
_ACCEPT: dict[Kind, bytes] = {"image": b"image/*", "video": b"video/*, image/*"}
# Characters that URL parsers disagree about; no valid URL has them.
_DOUBTFUL = re.compile(r"[\x00-\x20\x7f\\]")
_HOST = re.compile(r"[a-z0-9._:-]+")  # names, and addresses of both kinds without a zone
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s{0,99}<(?:!doctype\s+html|html)\b", re.IGNORECASE)
_CHUNK = 1 << 20  # bytes decoded or unpacked at a time; as base64 divisible by 4
_BROKEN = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
    OSError,
    ValueError,
)


class Fetcher:
    """Fetches with one set of limits. Safe for concurrent use on one event loop.

    Raises SettingError when a setting is not what it should be.
    """

    def __init__(self, settings: MediaSettings) -> None:
        self._settings = settings
        self._domains = {_allowed_host(name) for name in settings.allowed_media_domains}
        self._ports = {_allowed_port(port) for port in settings.allowed_media_ports}
        if (folder := settings.allowed_local_media_path) and not os.path.isdir(folder):
            raise SettingError("allowed_local_media_path: there is no such folder")
        self._tls = httpx.create_ssl_context()
        self._proxy = _proxy(settings.media_proxy, self._tls) if settings.media_proxy else None
        # Slow name servers and disks may block these threads, not those needed elsewhere.
        self._threads = concurrent.futures.ThreadPoolExecutor(32, "media-fetch")

    async def fetch(
        self,
        url: Source,
        param: str,
        kind: Kind = "image",
        allowance: Allowance | None = None,
        room: Share | None = None,
    ) -> bytes:
        """The encoded bytes of a picture or video. Raises MediaRefused naming ``param``.

        Parts of one request share an ``allowance``; without one this part is a request. The bytes
        take their memory from ``room``, if it is given, as they arrive; raises Unavailable when
        there is none left.
        """
        limits = self._settings
        is_image = kind == "image"
        part = Incoming(
            kind,
            param,
            limits.max_media_bytes if is_image else limits.max_video_bytes,
            allowance or Allowance(limits.max_request_media_bytes),
            room,
        )
        if isinstance(url, File):
            part.count(len(url.data))
            return url.data
        scheme = url[:5].lower()
        if scheme == "data:":
            await _decode(url, part)
            return part.value()
        try:
            async with asyncio.timeout(
                limits.fetch_timeout if is_image else limits.video_fetch_timeout
            ):
                if scheme == "file:" and limits.allowed_local_media_path:
                    await self._read_file(url, part)
                else:
                    await self._download(url, part)
        except TimeoutError:
            raise part.unreachable("not fetched in time") from None
        finally:
            part.is_wanted = False
        return part.value()

    async def close(self) -> None:
        """Give up the threads. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _read_file(self, url: str, part: Incoming) -> None:
        folder = self._settings.allowed_local_media_path
        try:
            if len(url) > MAX_URL or _DOUBTFUL.search(url):
                raise ValueError("not a URL")
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, read_file, url, folder, part)
        except (OSError, ValueError):
            # One answer, whether there is such a file or not.
            raise part.refused(
                "{What}'s URL names no file that this server may read.", "media_forbidden"
            ) from None

    async def _download(self, text: str, part: Incoming) -> None:
        url = self._parse(text, part)
        for _ in range(MAX_REDIRECTS + 1):
            async with self._get(url, part) as (response, network):
                headers = httpx.Headers(response.headers)
                if response.status == 200:
                    await _read(response, headers, part, network)
                    return
                target = headers.get("location")
                if response.status not in _REDIRECTS or target is None:
                    raise part.unreachable(f"status {response.status}")
                url = self._parse(target, part, base=url)
        raise part.unreachable("too many redirects")

    def _parse(self, text: str, part: Incoming, base: httpx.URL | None = None) -> httpx.URL:
        """Parse and apply every rule that needs no look-up."""
        refused = part.refused("{What}'s URL must be a valid data:, http: or https: URL.")
        if len(text) > MAX_URL or _DOUBTFUL.search(text):
            raise refused
        try:
            url = httpx.URL(text) if base is None else base.join(text)
            host = _ascii_host(url.host)
        except (httpx.InvalidURL, ValueError):
            raise refused from None
        if url.scheme not in _PORTS or url.userinfo or url.port == 0:
            raise refused
        if self._domains and host not in self._domains:
            raise _forbidden(part, "names a host that is not allowed")
        if self._ports and (url.port or _PORTS[url.scheme]) not in self._ports:
            raise _forbidden(part, "names a port that is not allowed")
        return url

    @contextlib.asynccontextmanager
    async def _get(
        self, url: httpx.URL, part: Incoming
    ) -> AsyncIterator[tuple[httpcore.Response, MeteredNetwork]]:
        """The head of an answer from a checked address; its body can be read in the context."""
        # A pool per answer instead of a client: no cookies, no proxies of the environment, no
        # redirects of its own, and the next name at this address makes its own TLS handshake.
        network = MeteredNetwork()
        try:
            async with httpcore.AsyncConnectionPool(
                ssl_context=self._tls, proxy=self._proxy, network_backend=network
            ) as connections:
                response = await self._answer(connections, url, part)
                try:
                    yield response, network
                finally:
                    await response.aclose()
        finally:
            await network.aclose()

    async def _answer(
        self, connections: httpcore.AsyncConnectionPool, url: httpx.URL, part: Incoming
    ) -> httpcore.Response:
        name = url.raw_host.decode("ascii")
        headers = [
            (b"Host", url.netloc),
            (b"User-Agent", b"internvl-server"),
            (b"Accept", _ACCEPT[part.kind]),
            (b"Accept-Encoding", b"identity"),
        ]
        reason = "no connection"
        for host in await self._resolve(url, part):
            request = httpcore.Request(
                "GET",
                httpcore.URL(
                    scheme=url.raw_scheme, host=host.encode(), port=url.port, target=url.raw_path
                ),
                headers=headers,
                # A proxy makes no handshake for us: there the name of the URL is the host's.
                extensions={} if self._proxy else {"sni_hostname": name},
            )
            try:
                return await connections.handle_async_request(request)
            except httpcore.ConnectError:
                continue  # the name may have an address that works from here
            except _BROKEN as error:
                reason = type(error).__name__
                break
        raise part.unreachable(reason)

    async def _resolve(self, url: httpx.URL, part: Incoming) -> list[str]:
        """The addresses to dial, all of them checked; with a proxy, the host to ask it for."""
        host = url.raw_host.decode("ascii")
        refused = _forbidden(part, "leads to an address that is not allowed")
        if self._proxy:
            # Names cannot be resolved where only the proxy gets out; it has to guard its network.
            if not self._settings.allow_private_media and not is_public_host(_ascii_host(host)):
                raise refused
            return [host]
        port = url.port or _PORTS[url.scheme]
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            )
            addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
        except (OSError, ValueError):
            raise part.unreachable("no address") from None
        if not self._settings.allow_private_media and not all(map(is_public, addresses)):
            raise refused
        return list(map(str, addresses[:MAX_ADDRESSES]))


async def _decode(url: str, part: Incoming) -> None:
    head = _DATA[part.kind].match(url[:256])
    if head is None:
        raise part.refused(
            f"A data: URL must have the form data:{part.kind}/<format>;base64,<data>."
        )
    start = head.end()
    part.expect((len(url) - start) // 4 * 3 - 2)
    try:
        if len(url) <= _CHUNK:
            _base64(url, start, part)
        else:
            await asyncio.to_thread(_base64, url, start, part)
    except ValueError:
        raise part.refused("The data: URL is not valid base64.") from None


def _base64(url: str, start: int, part: Incoming) -> None:
    """Decode strictly, a chunk at a time so that other threads get their turn."""
    if (len(url) - start) % 4 or start == len(url):
        raise ValueError("not whole base64 groups")
    if url.find("=", start, -2) >= 0:
        raise ValueError("padding inside")
    for at in range(start, len(url), _CHUNK):
        part.add(pybase64.b64decode(url[at : at + _CHUNK], validate=True))


async def _read(
    response: httpcore.Response, headers: httpx.Headers, part: Incoming, network: MeteredNetwork
) -> None:
    """Take the body. What the server calls it is not asked: the decoder looks at the content."""
    length = headers.get("content-length", "")
    if length.isdecimal():
        part.expect(int(length))
    coding = headers.get("content-encoding", "identity").strip().lower()
    pieces = _pieces(response, network)
    if coding in {"gzip", "x-gzip", "deflate"}:
        pieces = _unpacked(pieces, part)
    elif coding not in {"identity", ""}:
        raise part.unreachable("compressed answer")
    elif length.isdecimal() and "transfer-encoding" not in headers:
        network.expect_content_alone()
    try:
        async for piece in pieces:
            part.add(piece)
    except (*_BROKEN, zlib.error) as error:
        raise part.unreachable(f"broken off, {type(error).__name__}") from None
    if _PAGE.match(part.value()):
        raise part.refused("{What}'s URL leads to a web page.", "unsupported_media")


async def _pieces(response: httpcore.Response, network: MeteredNetwork) -> AsyncIterator[bytes]:
    async for piece in response.aiter_stream():
        network.content += len(piece)
        yield piece
        if len(piece) < 1024:
            await asyncio.sleep(0)  # what has arrived may be thousands of pieces


async def _unpacked(pieces: AsyncIterator[bytes], part: Incoming) -> AsyncIterator[bytes]:
    """Unpack gzip or zlib, never more than a chunk at a time. We ask for neither."""
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    async for packed in pieces:
        part.count(len(packed))
        while True:
            piece = unpacker.decompress(packed, _CHUNK)
            yield piece
            await asyncio.sleep(0)
            packed = unpacker.unconsumed_tail
            if not packed and len(piece) < _CHUNK:
                break
        if unpacker.unused_data:
            raise ValueError("something after the end")
    if not unpacker.eof:
        raise ValueError("no end")


def _ascii_host(host: str) -> str:
    """A host as it is compared: IDNA, lower case, no dot at the end. Raises ValueError."""
    plain = httpx.URL(scheme="http", host=host).raw_host.decode("ascii").lower().rstrip(".")
    if not _HOST.fullmatch(plain):
        raise ValueError("not a host")
    return plain


def _allowed_host(name: str) -> str:
    try:
        return _ascii_host(name)
    except (httpx.InvalidURL, ValueError):
        raise SettingError(f"allowed_media_domains: {name!r} is not a host name") from None


def _allowed_port(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise SettingError(f"allowed_media_ports: {text!r} is not a port")
    return int(text)


def _proxy(text: str, tls: ssl.SSLContext) -> httpcore.Proxy:
    # The text may hold a password: no message repeats it.
    wrong = SettingError("media_proxy: must be http://[user:password@]host:port, or https://")
    try:
        proxy = httpx.Proxy(text)
    except (httpx.InvalidURL, ValueError):
        raise wrong from None
    if proxy.url.scheme not in _PORTS or not proxy.url.host:
        raise wrong
    url = f"{proxy.url.scheme}://{proxy.url.netloc.decode('ascii')}"
    secure = tls if proxy.url.scheme == "https" else None
    return httpcore.Proxy(url, auth=proxy.raw_auth, ssl_context=secure)


def _forbidden(part: Incoming, reason: str) -> MediaRefused:
    return part.refused(f"{{What}}'s URL {reason}.", "media_forbidden")
