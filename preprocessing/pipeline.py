"""What the server calls: a picture of a request in, its tiles out.

``MediaPipeline`` owns the fetcher, the decode workers and the cache of tiles, and knows nothing of
prompts or tokens. The same bytes are decoded once while their tiles are in the cache.
"""

import asyncio
import contextlib
import weakref

from preprocessing.budget import Budget
from preprocessing.media import MediaPart, TiledMedia, TileSettings
from preprocessing.pool import QUEUE_TIMEOUT, DecodePool, PoolStats, too_many
from preprocessing.sources import Fetcher
from preprocessing.tile_cache import TileCache
from wire.digest import media_digest
from wire.errors import Unavailable
from wire.geometry import VisionGeometry
from wire.settings import MediaSettings

_LONG = 1 << 18  # bytes that take a thread longer to hash than a thread takes to start


class MediaPipeline:
    """Fetch, decode and tile. ``load`` may run many times at once.

    Raises SettingError when the settings contradict themselves.
    """

    def __init__(self, settings: MediaSettings) -> None:
        self._pool = DecodePool(settings)
        self._fetcher = Fetcher(settings)
        self._settings = settings
        self._memory = Budget(settings.media_memory)
        self._cache = TileCache(settings.tile_cache_bytes)
        self._locks = weakref.WeakValueDictionary[bytes, asyncio.Lock]()
        self._geometry: VisionGeometry | None = None

    @property
    def stats(self) -> PoolStats:
        """Counters of the decode workers since the start."""
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
        await self._pool.start(TileSettings.of(geometry))
        self._geometry = geometry

    async def load(self, part: MediaPart) -> TiledMedia:
        """Fetch, decode and tile one picture.

        Raises MediaRefused naming the part, or Unavailable when there is no worker to ask, or
        when the pictures of others take all of ``media_memory`` for too long.
        """
        if self._geometry is None:
            raise Unavailable("The picture decoder is not running.", retry_after=5)
        settings = TileSettings.of(self._geometry, part.max_tiles)
        encoded = self._settings.max_media_bytes
        if part.url[:5].lower() == "data:":
            encoded = min(encoded, len(part.url) * 3 // 4)
        async with contextlib.AsyncExitStack() as held:
            try:
                share = self._memory.share(encoded + settings.most_bytes, QUEUE_TIMEOUT)
                await held.enter_async_context(share)
            except TimeoutError:
                raise too_many(part.param) from None
            return await self._load(part, settings)

    async def _load(self, part: MediaPart, settings: TileSettings) -> TiledMedia:
        encoded = await self._fetcher.fetch(part.url, part.param)
        parts = (encoded, settings.digest_bytes, part.salt)
        digest = (
            media_digest(parts)
            if len(encoded) < _LONG
            else await asyncio.to_thread(media_digest, parts)
        )
        if not self._settings.tile_cache_bytes:
            return await self._decode(digest, encoded, settings, part.param)
        # Whoever comes while the same picture is decoded waits for it; a lock that nobody holds
        # or waits for disappears from the table.
        lock = self._locks.setdefault(digest, asyncio.Lock())
        async with lock:
            found = self._cache.get(digest)
            if found is None:
                found = await self._decode(digest, encoded, settings, part.param)
                self._cache.put(found)
        return found

    async def _decode(
        self, digest: bytes, encoded: bytes, settings: TileSettings, param: str
    ) -> TiledMedia:
        result, tiles = await self._pool.tile(encoded, settings, param)
        return TiledMedia(
            digest=digest,
            tiles=tiles,
            count=result.count,
            columns=result.columns,
            rows=result.rows,
            width=result.width,
            height=result.height,
        )

    async def close(self) -> None:
        """End the workers and give up all connections, for good. Idempotent."""
        self._geometry = None
        await self._fetcher.close()
        await self._pool.close()
