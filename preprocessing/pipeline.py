"""What the server calls: a picture or video of a request in, its tiles out.

``MediaPipeline`` owns the fetcher, the decode workers and the cache of tiles, and knows nothing of
prompts or tokens. The same bytes are decoded once while their tiles are in the cache.
``load`` does everything at once. Whoever must know how large things are before settling how many
tiles they get calls ``open`` and, when it is settled, ``tile``.
"""

import asyncio
import contextlib
import dataclasses
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar, cast

import msgspec

from preprocessing.allowance import Allowance
from preprocessing.budget import Budget, Share
from preprocessing.frames import segment_middles
from preprocessing.incoming import Incoming
from preprocessing.media import (
    Facts,
    File,
    FrameChoice,
    Kind,
    Loaded,
    MediaPart,
    Opened,
    Source,
    Spent,
    Tiled,
    TiledMedia,
    TiledVideo,
    TileSettings,
    Treatment,
    is_of_no_format,
    neither,
    too_many,
)
from preprocessing.pool import QUEUE_TIMEOUT, DecodePool, MediaStats
from preprocessing.sources import Fetcher
from preprocessing.tile_cache import TileCache
from preprocessing.turns import few_at_a_time
from wire.digest import content_digest, media_digest
from wire.errors import MediaRefused, Unavailable
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings
from wire.spans import Span, span

_LONG = 1 << 18  # bytes that take a thread longer to hash than a thread takes to start

T = TypeVar("T")
S = TypeVar("S")
L = TypeVar("L", TiledMedia, TiledVideo)


class MediaPipeline:
    """Fetch, decode and tile. All methods may run many times at once.

    Raises SettingError when the settings contradict themselves.
    """

    def __init__(self, settings: MediaSettings) -> None:
        self._pool = DecodePool(settings)
        self._fetcher = Fetcher(settings)
        self._settings = settings
        # Downloads last as long as their servers like: they take memory only as they arrive, and
        # whoever sends the files waits for none.
        half = -(-settings.media_memory // 2)
        self._memory, self._downloads = Budget(half), Budget(half)
        # So do uploads; whoever sends many and never ends them leaves downloads their room.
        self._uploads = Budget(half // 2, within=self._downloads)
        self._cache = TileCache(settings.tile_cache_bytes)
        self._locks = weakref.WeakValueDictionary[bytes, asyncio.Lock]()
        self._geometry: VisionGeometry | None = None

    @property
    def stats(self) -> MediaStats:
        """Counters since the start."""
        return self._pool.stats

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the decode workers."""
        return self._pool.pids

    @property
    def missing(self) -> list[str]:
        """Layers of the decode workers' sandbox that this system lacks."""
        return self._pool.missing

    async def start(self, geometry: VisionGeometry) -> None:
        """Start the decode workers for a model; again with the same geometry does nothing.

        Raises Unavailable when the workers do not start.
        """
        if geometry == self._geometry:
            return
        await self._pool.close()
        await self._pool.start()
        self._geometry = geometry

    async def load(self, part: MediaPart) -> Loaded:
        """Fetch, decode and tile one picture, or one video.

        Raises MediaRefused naming the part, or Unavailable when there is no worker to ask, or
        when the parts of others take all of ``media_memory`` for too long.
        """
        settings = self._settings_of(part)
        if isinstance(part.url, tuple):
            shown = _chosen(part)
            frames = await self._each(shown, self._load_picture)
            return _as_video(frames, shown, part)
        if part.is_remote:
            async with self.hold([part]) as room:
                return await self.tile(part, await self.open(part, room, look=False))
        tiles = _most_tile_bytes(part, settings)
        async with self._room(self._most_encoded(part) + tiles, part.param) as share:
            began = time.monotonic()
            encoded = await self._fetch(part)
            share.keep(len(encoded) + tiles)
            fetched = time.monotonic() - began
            return await self._tile(part, encoded, settings, fetched)

    @contextlib.asynccontextmanager
    async def hold(self, parts: Sequence[MediaPart]) -> AsyncIterator[Share | None]:
        """Room for the encoded bytes of all of ``parts``, while they are opened and tiled. Where
        something is downloaded, nothing is waited for: what this yields is taken from as bytes
        arrive, and Unavailable raised then if nothing is left.

        Raises Unavailable when there is none for too long.
        """
        if any(part.is_remote for part in parts):
            async with self._downloads.share(0) as room:
                yield room
        else:
            async with self._room(sum(map(self._most_encoded, parts)), "messages"):
                yield None

    @property
    def most_arriving(self) -> int:
        """Bytes of the largest upload that there can be room for."""
        return self._uploads.total

    def arriving(self) -> contextlib.AbstractAsyncContextManager[Share]:
        """Room that is taken from as bytes arrive, at once or not at all, as fast as their sender
        likes."""
        return self._uploads.share(0)

    async def identify(self, encoded: bytes, param: str) -> tuple[Kind, Facts]:
        """What a file is, by its header: a picture, or else a video. Raises MediaRefused for what
        is neither or too large, and Unavailable."""
        limits = self._settings
        treatment = cast(Treatment, limits.preprocess)
        kinds: tuple[tuple[Kind, int], ...] = (
            ("image", limits.max_media_bytes),
            ("video", limits.max_video_bytes),
        )
        for kind, most in kinds:
            try:
                facts = await self._pool.look(encoded, kind, treatment, param)
            except MediaRefused as refused:
                if not is_of_no_format(refused, kind):
                    raise
            else:
                Incoming(kind, param, most, Allowance(most)).expect(len(encoded))
                return kind, facts
        raise neither(param)

    async def open(self, part: MediaPart, room: Share | None, *, look: bool = True) -> Opened:
        """Fetch a part and, with ``look``, read its headers. Raises as ``load`` does."""
        self._settings_of(part)
        pictures = _pictures(part) if isinstance(part.url, tuple) else [part]
        began = time.monotonic()
        files = await self._each(pictures, lambda picture: self._fetch(picture, room))
        fetched = time.monotonic() - began
        asked = list(zip(pictures, files, strict=True)) if look else []
        return Opened(tuple(files), tuple(await self._each(asked, self._look)), fetched)

    async def tile(self, part: MediaPart, opened: Opened) -> Loaded:
        """Decode and tile what was opened, with the bounds that ``part`` has now."""
        settings = self._settings_of(part)
        if not isinstance(part.url, tuple):
            return await self._tile(part, opened.files[0], settings, opened.fetch_seconds)
        shown = _chosen(part)
        found = [(picture, opened.files[index]) for index, picture in shown]

        async def tiled(pair: tuple[MediaPart, bytes]) -> TiledMedia:
            return await self._picture(pair[1], settings, pair[0], 0.0)

        video = _as_video(await self._each(found, tiled), shown, part)
        return dataclasses.replace(video, spent=video.spent._replace(fetch=opened.fetch_seconds))

    def _settings_of(self, part: MediaPart) -> TileSettings:
        if self._geometry is None:
            raise Unavailable("The decoder of pictures is not running.", retry_after=5)
        settings = TileSettings.for_part(part.geometry or self._geometry, part)
        fast = self._settings.image_decoding == "fast" and part.treatment == "normalized"
        return msgspec.structs.replace(settings, fast=fast)

    def _most_encoded(self, part: MediaPart) -> int:
        """Bytes that the files of a part can have, of which none is downloaded."""
        kind: Kind = "image" if isinstance(part.url, tuple) else part.kind
        most = self._settings.max_media_bytes if kind == "image" else self._settings.max_video_bytes
        return sum(min(most, _most_bytes(url, most)) for url in part.urls)

    @contextlib.asynccontextmanager
    async def _room(self, size: int, param: str) -> AsyncIterator[Share]:
        async with contextlib.AsyncExitStack() as held:
            try:
                share = await held.enter_async_context(self._memory.share(size, QUEUE_TIMEOUT))
            except TimeoutError:
                raise too_many(param) from None
            yield share

    async def _each(self, parts: Sequence[S], work: Callable[[S], Awaitable[T]]) -> list[T]:
        return await few_at_a_time(work, parts, self._settings.decode_workers + 1)

    async def _fetch(self, part: MediaPart, room: Share | None = None) -> bytes:
        with span("media.fetch", _named(part)) as fetching:
            encoded = await self._fetcher.fetch(
                cast(Source, part.url), part.param, part.kind, part.allowance, room
            )
            fetching.set({"internvl.media.bytes": len(encoded)})
        return encoded

    async def _look(self, asked: tuple[MediaPart, bytes]) -> Facts:
        part, encoded = asked
        with span("media.look", _named(part)):
            return await self._pool.look(encoded, part.kind, part.treatment, part.param)

    async def _load_picture(self, numbered: tuple[int, MediaPart]) -> TiledMedia:
        return cast(TiledMedia, await self.load(numbered[1]))

    async def _tile(
        self, part: MediaPart, encoded: bytes, settings: TileSettings, fetched: float
    ) -> Loaded:
        if part.kind == "image":
            return await self._picture(encoded, settings, part, fetched)
        return await self._video(encoded, settings, part, fetched)

    async def _picture(
        self, encoded: bytes, settings: TileSettings, part: MediaPart, fetched: float
    ) -> TiledMedia:
        digest = await _digest(encoded, settings, part)

        async def decode() -> TiledMedia:
            result, tiles = await self._pool.tile(encoded, settings, part.param)
            return _tiled(digest, result, tiles)

        with span("media.decode", _named(part)) as decoding:
            picture = await self._once(digest, decode, fetched)
            _tell(decoding, picture, picture.count)
        return picture

    async def _video(
        self, encoded: bytes, settings: TileSettings, part: MediaPart, fetched: float
    ) -> TiledVideo:
        choice = part.choice or FrameChoice(self._settings.num_video_frames)
        file = await _digest(encoded, settings, part)
        digest = media_digest((file, msgspec.msgpack.encode(choice)))

        async def decode() -> TiledVideo:
            result, buffers = await self._pool.frames(encoded, settings, choice, part.param)
            frames = [
                # However many frames are shown: the same frame is the same picture.
                _tiled(media_digest((file, index.to_bytes(8, "little"))), one, tiles)
                for index, one, tiles in zip(result.indices, result.tiles, buffers, strict=True)
            ]
            return TiledVideo(
                digest,
                tuple(frames),
                tuple(result.indices),
                tuple(result.seconds),
                result.facts,
                _sum(frames),
            )

        with span("media.decode", _named(part)) as decoding:
            video = await self._once(digest, decode, fetched)
            _tell(decoding, video, sum(frame.count for frame in video.frames))
        return video

    async def _once(self, digest: bytes, decode: Callable[[], Awaitable[L]], fetched: float) -> L:
        """What the cache has, or else what ``decode`` makes, with the seconds spent on it."""
        began = time.monotonic()
        if not self._settings.tile_cache_bytes:
            found = await decode()
        else:
            # Whoever comes while the same picture is decoded waits for it; a lock that nobody
            # holds or waits for disappears from the table.
            async with self._locks.setdefault(digest, asyncio.Lock()):
                cached = self._cache.get(digest)
                self.stats.tile_queries += 1
                if cached is not None:
                    self.stats.tile_hits += 1
                    return dataclasses.replace(cast(L, cached), spent=Spent(fetched))
                found = await decode()
                self._cache.put(found)
        spent = found.spent.within(time.monotonic() - began)
        return dataclasses.replace(found, spent=spent._replace(fetch=fetched))

    def forget(self) -> None:
        """Keep no tiles of earlier pictures."""
        self._cache.clear()

    async def close(self) -> None:
        """End the workers and give up all connections, for good. Idempotent."""
        self._geometry = None
        await self._fetcher.close()
        await self._pool.close()


def _named(part: MediaPart) -> dict[str, str]:
    """Which one it is, in a trace; ``param`` is a path of ours, not its URL."""
    return {"internvl.media.kind": part.kind, "internvl.media.part": part.param}


def _tell(decoding: Span, loaded: Loaded, tiles: int) -> None:
    """What became of it, just now. A worker tells how long tiling took; of a video it is the sum
    over the frames."""
    spent, now = loaded.spent, time.time()
    decoding.set(
        {
            "internvl.media.tiles": tiles,
            "internvl.media.cache_hit": spent.prepare == 0,
            "internvl.media.queue_seconds": spent.queue,
        }
    )
    if spent.tile:
        decoding.child("media.tile", now - spent.tile).end(now)


async def _digest(encoded: bytes, settings: TileSettings, part: MediaPart) -> bytes:
    if isinstance(part.url, File):
        content = part.url.digest
    elif len(encoded) < _LONG:
        content = content_digest(encoded)
    else:
        content = await asyncio.to_thread(content_digest, encoded)
    return media_digest((content, settings.digest_bytes, part.salt))


def _most_bytes(url: Source, most: int) -> int:
    """That a file can have; ``most`` where nothing tells."""
    if isinstance(url, File):
        return len(url.data)
    return len(url) * 3 // 4 if url[:5].lower() == "data:" else most


def _tiled(digest: bytes, result: Tiled, tiles: bytes) -> TiledMedia:
    return TiledMedia(
        digest=digest,
        tiles=tiles,
        count=result.count,
        columns=result.columns,
        rows=result.rows,
        width=result.width,
        height=result.height,
        spent=Spent(decode=result.decode_seconds, tile=result.tile_seconds),
    )


def _most_tile_bytes(part: MediaPart, settings: TileSettings) -> int:
    """Bytes that the tiles of a part can have."""
    return settings.most_bytes * (1 if part.choice is None else part.choice.most)


def _pictures(part: MediaPart) -> list[MediaPart]:
    """The pictures of a video that was given as pictures; each is one frame."""
    most = 1 if part.max_tiles is None else part.max_tiles
    return [
        dataclasses.replace(
            part,
            url=url,
            param=f"{part.param}[{index}]",
            kind="image",
            choice=None,
            max_tiles=most,
        )
        for index, url in enumerate(part.urls)
    ]


def _chosen(part: MediaPart) -> list[tuple[int, MediaPart]]:
    """Those that are shown, with their numbers."""
    pictures = _pictures(part)
    most = len(pictures) if part.choice is None else part.choice.most
    return [(index, pictures[index]) for index in segment_middles(0, len(pictures) - 1, most)]


def _as_video(
    frames: Sequence[TiledMedia], shown: Sequence[tuple[int, MediaPart]], part: MediaPart
) -> TiledVideo:
    return TiledVideo(
        media_digest(tuple(frame.digest for frame in frames)),
        tuple(frames),
        tuple(index for index, _ in shown),
        spent=_sum(frames),
    )


def _sum(frames: Sequence[TiledMedia]) -> Spent:
    """What was spent on all of them."""
    return Spent(*map(sum, zip(*(frame.spent for frame in frames), strict=True)))
