"""The cache of tiles keeps what was asked for last, within its budget."""

from hypothesis import given
from hypothesis import strategies as st

from preprocessing.media import TiledMedia
from preprocessing.tile_cache import TileCache


def picture(name: int, size: int) -> TiledMedia:
    return TiledMedia(b"%d" % name, bytes(size), 1, 1, 1, 1, 1)


def test_the_picture_asked_for_longest_ago_goes_first() -> None:
    cache = TileCache(30)
    for name in range(3):
        cache.put(picture(name, 10))
    assert cache.get(b"0") is not None
    cache.put(picture(3, 10))
    assert [cache.get(b"%d" % name) is not None for name in range(4)] == [True, False, True, True]


def test_what_is_larger_than_the_budget_drives_nothing_out() -> None:
    cache = TileCache(10)
    cache.put(picture(1, 10))
    cache.put(picture(2, 11))
    assert cache.get(b"1") is not None
    assert cache.get(b"2") is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12)), max_size=60), st.integers(0, 30))
def test_it_holds_the_latest_that_fit(asked: list[tuple[int, int]], budget: int) -> None:
    """Against a list that is searched from its end."""
    cache, sizes, order = TileCache(budget), dict[int, int](), list[int]()
    for name, size in asked:
        size = sizes.setdefault(name, size)
        found = cache.get(b"%d" % name)
        assert (found is not None) == (name in order)
        if name in order:
            order.remove(name)
        elif size > budget:
            continue
        else:
            cache.put(picture(name, size))
        order.append(name)
        while sum(sizes[n] for n in order) > budget:
            del order[0]
