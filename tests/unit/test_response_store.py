"""The store of responses: who finds what, for how long, and how much it holds."""

import dataclasses
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from server.dialects.store import ITEM, MENTION, OVERHEAD, ResponseStore, Stored


def entry(*items: bytes, body: bytes = b"") -> Stored:
    return Stored(body, items)


def test_an_entry_is_found_by_its_tenant_until_its_time_is_over() -> None:
    now = 0.0
    store = ResponseStore(10_000, 60, lambda: now)
    assert store.put(b"a", "one", entry(b"item"))
    assert store.get(b"b", "one") is None
    assert not store.delete(b"b", "one")
    now = 59.0
    assert store.get(b"a", "one") == entry(b"item")
    now = 60.0
    assert store.get(b"a", "one") is None
    assert store.used == 0


def test_what_a_conversation_shares_is_counted_once_and_as_long_as_it_is_used() -> None:
    store = ResponseStore(1 << 20, 60, lambda: 0.0)
    picture, question = b"p" * 10_000, b"q" * 100
    store.put(b"", "first", entry(picture))
    store.put(b"", "second", entry(picture, question))
    assert store.used == 2 * OVERHEAD + 3 * MENTION + 2 * ITEM + 10_100
    store.delete(b"", "first")
    assert store.used == OVERHEAD + 2 * MENTION + 2 * ITEM + 10_100
    store.delete(b"", "second")
    assert store.used == 0


def test_who_takes_most_loses_first_and_what_never_fits_is_not_kept() -> None:
    store = ResponseStore(10 * (OVERHEAD + MENTION + ITEM + 100), 60, lambda: 0.0)
    store.put(b"small", "only", entry(bytes([1] * 100)))
    for number in range(50):
        assert store.put(b"large", str(number), entry(bytes([number] * 100)))
    assert store.get(b"small", "only")
    assert store.get(b"large", "40") is None
    assert store.get(b"large", "41")
    assert not store.put(b"small", "huge", entry(b"x" * 10_000))
    assert store.get(b"small", "only")
    assert store.used <= 10 * (OVERHEAD + MENTION + ITEM + 100)


def test_branches_of_a_long_conversation_take_no_memory_that_is_not_counted() -> None:
    most = 1 << 20
    store = ResponseStore(most, 60, lambda: 0.0)
    long = entry(*[b"%d" % number for number in range(2_000)])
    tracemalloc.start()
    try:
        for number in range(500):
            branch = dataclasses.replace(long, items=(*long.items, b"last %d" % number))
            store.put(b"", str(number), branch)
        del branch
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken <= most


ACTION = st.tuples(
    st.sampled_from(["put", "delete", "wait"]),
    st.sampled_from([b"a", b"b"]),
    st.integers(0, 5),
    st.lists(st.integers(0, 4), max_size=4),
)


@given(st.lists(ACTION, max_size=40))
def test_its_size_is_always_what_it_holds(actions: list[tuple[str, bytes, int, list[int]]]) -> None:
    now = 0.0
    most = 6 * OVERHEAD
    store = ResponseStore(most, 5, lambda: now)
    items = {who: [bytes([at]) * 300 * at for at in range(5)] for who in (b"a", b"b")}
    kept: dict[tuple[bytes, str], Stored] = {}
    for kind, who, name, chosen in actions:
        if kind == "wait":
            now += 1
        elif kind == "delete":
            store.delete(who, str(name))
        else:
            made = entry(*(items[who][at] for at in chosen), body=b"x" * name)
            store.delete(who, str(name))
            store.put(who, str(name), made)
            kept[who, str(name)] = made
        there = {key: one for key, one in kept.items() if store.get(*key) is one}
        distinct = {
            (who, id(item)): ITEM + len(item)
            for (who, _), one in there.items()
            for item in one.items
        }
        bodies = sum(OVERHEAD + len(one.body) + MENTION * len(one.items) for one in there.values())
        assert store.used == bodies + sum(distinct.values()) <= most
