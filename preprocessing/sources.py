"""Turn the URL of a part into encoded bytes: the only place that opens a connection for a client.

The pipeline calls ``Fetcher.fetch``; nothing else in the server may fetch a client's URL. A URL
is parsed once and the parsed object is what is checked and dialled. A name is resolved once,
all its addresses are checked, and the checked address itself is dialled, so nothing can change
between check and use. Every redirect passes the same gate. Refusals name the part; they never
hold an address, a path or a library's text. All that can go wrong once an address is dialled is
one refusal to the client, who could map a network by the differences; the log says which it was.
"""

import asyncio
import binascii
import concurrent.futures
import ipaddress
import logging
import re
import socket

import httpx

from preprocessing.addresses import Address, is_public
from wire.errors import MediaRefused
from wire.settings import MediaSettings, SettingError

log = logging.getLogger(__name__)

MAX_REDIRECTS = 3
MAX_URL = 8192  # characters of an http(s) URL
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = {301, 302, 303, 307, 308}
_DATA = re.compile(r"data:(?:image/[a-z0-9.+-]+|application/octet-stream);base64,", re.IGNORECASE)
# Characters that URL parsers disagree about; no valid URL has them.
_DOUBTFUL = re.compile(r"[\x00-\x20\x7f\\]")
_HOST = re.compile(r"[a-z0-9._:-]+")  # names, and addresses of both kinds without a zone
_CHUNK = 1 << 20  # characters of base64 decoded at a time; divisible by 4


class Fetcher:
    """Fetches with one set of limits. Safe for concurrent use on one event loop."""

    def __init__(self, settings: MediaSettings) -> None:
        self._settings = settings
        self._domains = {_allowed_host(name) for name in settings.allowed_media_domains}
        self._ports = {_allowed_port(port) for port in settings.allowed_media_ports}
        # A transport instead of a client: no cookies, no proxies, no redirects of its own. No
        # connection is kept: the next name at the same address must make its own TLS handshake.
        self._transport = httpx.AsyncHTTPTransport(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )
        # Slow name servers may block these threads, not those that the server needs elsewhere.
        self._resolvers = concurrent.futures.ThreadPoolExecutor(8, "media-resolve")

    async def fetch(self, url: str, param: str) -> bytes:
        """The encoded bytes of a picture. Raises MediaRefused naming ``param``."""
        if url[:5].lower() == "data:":
            return await self._decode(url, param)
        try:
            async with asyncio.timeout(self._settings.fetch_timeout):
                return await self._download(url, param)
        except TimeoutError:
            raise _unreachable("not fetched in time", param) from None

    async def close(self) -> None:
        """Give up the connections and threads. Idempotent."""
        await self._transport.aclose()
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def _decode(self, url: str, param: str) -> bytes:
        head = _DATA.match(url[:256])
        if head is None:
            raise MediaRefused(
                "A data: URL must have the form data:image/<format>;base64,<data>.", param=param
            )
        start = head.end()
        if (len(url) - start) // 4 * 3 > self._settings.max_media_bytes + 2:
            raise self._too_large(param)
        try:
            if len(url) <= _CHUNK:
                encoded = _base64(url, start)
            else:
                encoded = await asyncio.to_thread(_base64, url, start)
        except ValueError:
            raise MediaRefused("The data: URL is not valid base64.", param=param) from None
        if len(encoded) > self._settings.max_media_bytes:
            raise self._too_large(param)
        return encoded

    async def _download(self, text: str, param: str) -> bytes:
        url = self._parse(text, param)
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._get(url, param)
            try:
                if response.status_code == 200:
                    return await self._read(response, param)
                target = response.headers.get("location")
                if response.status_code not in _REDIRECTS or target is None:
                    raise _unreachable(f"status {response.status_code}", param)
                url = self._parse(target, param, base=url)
            finally:
                await response.aclose()
        raise _unreachable("too many redirects", param)

    def _parse(self, text: str, param: str, base: httpx.URL | None = None) -> httpx.URL:
        """Parse and apply every rule that needs no look-up."""
        refused = MediaRefused(
            "The picture's URL must be a valid data:, http: or https: URL.", param=param
        )
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
            raise _forbidden("The picture's URL names a host that is not allowed.", param)
        if self._ports and (url.port or _PORTS[url.scheme]) not in self._ports:
            raise _forbidden("The picture's URL names a port that is not allowed.", param)
        return url

    async def _get(self, url: httpx.URL, param: str) -> httpx.Response:
        """Send one request to a checked address; the caller reads and closes the response."""
        host = url.raw_host.decode("ascii")
        reason = "no connection"
        for address in await self._resolve(url, param):
            request = httpx.Request(
                "GET",
                url.copy_with(host=str(address), fragment=None),
                headers={
                    "Host": url.netloc.decode("ascii"),
                    "User-Agent": "internvl-server",
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                },
                extensions={"sni_hostname": host},
            )
            try:
                return await self._transport.handle_async_request(request)
            except httpx.ConnectError:
                continue  # the name may have an address that works from here
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
                reason = type(error).__name__
                break
        raise _unreachable(reason, param)

    async def _resolve(self, url: httpx.URL, param: str) -> list[Address]:
        port = url.port or _PORTS[url.scheme]
        host = url.raw_host.decode("ascii")
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._resolvers, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            )
            addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
        except (OSError, ValueError):
            raise _unreachable("no address", param) from None
        if not self._settings.allow_private_media and not all(map(is_public, addresses)):
            raise _forbidden("The picture's URL leads to an address that is not allowed.", param)
        return addresses

    async def _read(self, response: httpx.Response, param: str) -> bytes:
        # Compressed bodies are refused rather than unpacked: pictures are compressed already,
        # and we have asked for none.
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _unreachable("compressed answer", param)
        most = self._settings.max_media_bytes
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise self._too_large(param)
        body = bytearray()
        try:
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > most:
                    raise self._too_large(param)
        except (httpx.HTTPError, httpx.StreamError, OSError):
            raise _unreachable("broken off", param) from None
        return bytes(body)

    def _too_large(self, param: str) -> MediaRefused:
        most = self._settings.max_media_bytes
        return MediaRefused(
            f"The picture has more than {most} encoded bytes.",
            param=param,
            code="media_too_large",
        )


def _base64(url: str, start: int) -> bytes:
    """Decode strictly, a chunk at a time so that other threads get their turn."""
    if (len(url) - start) % 4 or start == len(url):
        raise ValueError("not whole base64 groups")
    if "=" in url[start:-2]:
        raise ValueError("padding inside")
    return b"".join(
        binascii.a2b_base64(url[at : at + _CHUNK], strict_mode=True)
        for at in range(start, len(url), _CHUNK)
    )


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


def _unreachable(reason: str, param: str) -> MediaRefused:
    log.info("a picture could not be fetched: %s (%s)", reason, param)
    return MediaRefused("The picture could not be fetched.", param=param, code="media_unreachable")


def _forbidden(message: str, param: str) -> MediaRefused:
    return MediaRefused(message, param=param, code="media_forbidden")
