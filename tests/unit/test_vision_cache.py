"""The logical vision cache."""

from engine.vision_cache import VisionCache


def test_an_entry_is_shared_until_its_last_reader_releases_it() -> None:
    cache = VisionCache(10)
    assert not cache.acquire(b"a")
    assert cache.reserve(b"a", 6)
    assert cache.acquire(b"a")
    cache.release(b"a")
    assert not cache.reserve(b"b", 6)
    cache.release(b"a")
    assert cache.reserve(b"b", 6)
    assert cache.take_dropped() == [b"a"]
    assert cache.take_dropped() == []


def test_an_unreferenced_entry_stays_for_the_next_reader() -> None:
    cache = VisionCache(10)
    cache.reserve(b"a", 6)
    cache.release(b"a")
    assert cache.acquire(b"a")
    assert not cache.has_dropped
    cache.check()


def test_the_entry_released_longest_ago_is_evicted_first() -> None:
    cache = VisionCache(9)
    for digest in (b"a", b"b", b"c"):
        cache.reserve(digest, 3)
    for digest in (b"b", b"a", b"c"):
        cache.release(digest)
    cache.reserve(b"d", 4)
    assert cache.take_dropped() == [b"b", b"a"]
    assert cache.acquire(b"c")


def test_nothing_is_evicted_for_an_entry_that_does_not_fit_anyway() -> None:
    cache = VisionCache(10)
    cache.reserve(b"pinned", 6)
    cache.reserve(b"idle", 3)
    cache.release(b"idle")
    assert not cache.reserve(b"large", 5)
    assert cache.acquire(b"idle")


def test_an_entry_over_the_whole_budget_is_admitted_alone_and_dropped_at_once() -> None:
    cache = VisionCache(10)
    cache.reserve(b"small", 4)
    assert not cache.reserve(b"huge", 50)
    cache.release(b"small")
    assert cache.reserve(b"huge", 50)
    assert cache.take_dropped() == [b"small"]
    assert not cache.reserve(b"small", 4)
    cache.check()
    cache.release(b"huge")
    assert cache.take_dropped() == [b"huge"]
    assert cache.used == 0


def test_a_flush_drops_what_is_idle_now_and_the_rest_when_it_is_released() -> None:
    cache = VisionCache(10)
    for digest in (b"a", b"b"):
        cache.reserve(digest, 3)
    cache.release(b"a")
    cache.flush()
    cache.check()
    assert cache.take_dropped() == [b"a"]
    assert not cache.acquire(b"a")
    cache.release(b"b")
    assert cache.take_dropped() == [b"b"]
    # What came later is kept as ever.
    cache.reserve(b"b", 3)
    cache.release(b"b")
    assert cache.acquire(b"b")
    cache.check()
