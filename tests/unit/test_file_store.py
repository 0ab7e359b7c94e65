"""Uploaded files: for some time, in some room, and for whose they are."""

import random
import threading

import pytest

from preprocessing.media import File
from server.files import OVERHEAD, FileStore, Upload
from wire.digest import content_digest

A, B, C = b"tenant a", b"tenant b", b"tenant c"


class Shop:
    """A store with a clock that the test winds."""

    def __init__(self, most: int, seconds: float = 100.0) -> None:
        self.now = 1000.0
        self.evicted: list[str] = []
        self.store = FileStore(most, seconds, self.evicted.append, lambda: self.now)

    def put(
        self, tenant: bytes, data: bytes, name: str = "a.png", seconds: float | None = None
    ) -> Upload:
        file = File(data, content_digest(data))
        return self.store.put(
            tenant, tenant.decode(), file, ("image", "PNG"), name, "vision", seconds
        )

    def has(self, tenant: bytes, upload: Upload) -> bool:
        return upload.id in [one.id for one in self.store.all(tenant)]


def room(*sizes: int) -> int:
    """Of files of these sizes, and not a byte more."""
    return sum(sizes) + OVERHEAD * len(sizes)


def test_the_same_bytes_have_one_id_and_take_their_room_once() -> None:
    shop = Shop(room(10, 10))
    first = shop.put(A, b"x" * 10, "first.png", 50)
    shop.now += 20
    second = shop.put(A, b"x" * 10, "second.png")
    assert first.id == second.id
    assert shop.store.used == room(10)
    assert shop.store.count == 1
    kept = shop.store.get(A, first.id)
    assert kept is second
    assert (kept.filename, kept.created_at, kept.expires_at) == ("second.png", 1020, 1120)
    assert shop.put(A, b"y" * 10).id != first.id


def test_another_server_gives_the_same_file_the_same_id() -> None:
    assert Shop(1 << 20).put(A, b"x").id == Shop(1 << 20).put(A, b"x").id


def test_tenants_do_not_see_each_others_files() -> None:
    shop = Shop(1 << 20)
    mine, yours = shop.put(A, b"x"), shop.put(B, b"x")
    assert mine.id != yours.id
    assert shop.store.get(B, mine.id) is None
    assert shop.store.all(C) == []
    assert not shop.store.delete(B, mine.id)
    assert shop.store.delete(A, mine.id)
    assert not shop.store.delete(A, mine.id)
    assert shop.store.get(B, yours.id) is yours
    assert shop.store.used == room(1)


def test_files_end_with_their_time_and_never_later_than_the_server_keeps_them() -> None:
    shop = Shop(1 << 20, seconds=100)
    usual, brief = shop.put(A, b"a"), shop.put(A, b"b", seconds=10)
    greedy = shop.put(B, b"c", seconds=1e9)
    assert (usual.expires_at, brief.expires_at, greedy.expires_at) == (1100, 1010, 1100)
    shop.now = 1009.9
    assert shop.store.get(A, brief.id)
    shop.now = 1010
    assert shop.store.get(A, brief.id) is None
    assert shop.evicted == ["expired"]
    shop.now = 1099.9
    assert shop.store.count == 2
    shop.now = 1100
    shop.store.expire()  # nobody has asked for them
    assert shop.evicted == ["expired"] * 3
    assert shop.store.used == 0


def test_an_upload_that_is_renewed_lives_from_then_on() -> None:
    shop = Shop(1 << 20, seconds=100)
    upload = shop.put(A, b"a")
    shop.now += 60
    shop.put(A, b"a")
    shop.now += 60
    assert shop.store.get(A, upload.id)
    shop.now += 40
    assert shop.store.get(A, upload.id) is None


def test_what_was_used_longest_ago_goes_for_what_comes() -> None:
    shop = Shop(room(10, 10))
    first, second = shop.put(A, b"a" * 10), shop.put(A, b"b" * 10)
    shop.store.get(A, first.id)
    third = shop.put(A, b"c" * 10)
    assert [shop.has(A, one) for one in (first, second, third)] == [True, False, True]
    assert shop.evicted == ["room"]
    assert shop.store.used == room(10, 10)


def test_a_file_that_takes_all_the_room_is_kept_and_one_byte_more_has_none() -> None:
    shop = Shop(room(10, 10))
    shop.put(A, b"a" * 10)
    whole = shop.put(A, b"b" * shop.store.most_bytes)
    assert shop.store.used == room(10, 10)
    assert shop.has(A, whole)
    assert Shop(0).store.most_bytes < 1


def test_who_takes_most_gives_first_and_others_keep_what_they_have() -> None:
    shop = Shop(room(*[10] * 10))
    small = shop.put(B, b"small" * 2)
    for number in range(40):
        shop.put(A, b"%010d" % number)
    assert shop.has(B, small)
    assert len(shop.store.all(A)) == 9
    for number in range(40):
        shop.put(B, b"%010d" % number)
    assert len(shop.store.all(A)) in (4, 5, 6)  # equal parts, up to the one that comes


def test_who_would_take_most_with_what_comes_drops_its_own() -> None:
    shop = Shop(room(*[10] * 4))
    others = [shop.put(A, b"%010d" % number) for number in range(2)]
    own = [shop.put(B, b"%010d" % number) for number in range(3)]
    assert [shop.has(A, one) for one in others] == [True, True]
    assert [shop.has(B, one) for one in own] == [False, True, True]


def test_there_are_never_more_files_than_can_be_looked_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.files.MAX_FILES", 8)
    shop = Shop(1 << 20)
    for number in range(20):
        shop.put(A, b"%d" % number)
    assert shop.store.count == 7  # each takes a byte beside its eighth
    assert shop.put(B, b"x" * shop.store.most_bytes).file.data
    assert shop.store.count == 1


def test_files_are_listed_in_the_order_in_which_they_came() -> None:
    shop = Shop(1 << 20)
    uploads = []
    for number in range(5):
        shop.now += 1
        uploads.append(shop.put(A, b"%d" % number))
    uploads.append(shop.put(A, b"at the same time"))
    shop.now -= 2.5  # somebody sets the clock
    uploads.append(shop.put(A, b"later"))
    assert len({upload.created_at for upload in uploads}) == 7
    shop.store.get(A, uploads[0].id)  # is used, not uploaded
    assert shop.store.all(A) == uploads
    shop.now += 1
    again = shop.put(A, b"1")
    assert shop.store.all(A) == [uploads[0], *uploads[2:], again]


@pytest.mark.parametrize("seed", range(4))
def test_it_agrees_with_a_plain_model_and_its_sums_are_right(seed: int) -> None:
    dice = random.Random(seed)
    shop = Shop(room(*[50] * 8), seconds=30)
    alive: dict[tuple[bytes, str], float] = {}
    for _ in range(600):
        tenant = dice.choice([A, B, C])
        shop.now += dice.random()
        known = [name for owner, name in alive if owner == tenant]
        if known and dice.random() < 0.3:
            name = dice.choice(known)
            found = shop.store.get(tenant, name)
            assert found is None or found.expires_at > shop.now
        elif known and dice.random() < 0.2:
            name = dice.choice(known)
            there = shop.store.get(tenant, name) is not None
            assert shop.store.delete(tenant, name) == there
        else:
            upload = shop.put(
                tenant, bytes([dice.randrange(30)]) * 50, seconds=dice.choice([None, 5])
            )
            alive[tenant, upload.id] = upload.expires_at
            assert shop.has(tenant, upload)
        files = [one for owner in (A, B, C) for one in shop.store.all(owner)]
        assert shop.store.used == room(*[50] * len(files)) <= room(*[50] * 8)
        assert shop.store.count == len(files)
        assert all(one.expires_at > shop.now for one in files)


def test_many_threads_leave_it_whole() -> None:
    shop = Shop(room(*[100] * 20))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        try:
            for _ in range(400):
                tenant = dice.choice([A, B, C])
                upload = shop.put(tenant, bytes([dice.randrange(50)]) * 100)
                found = shop.store.get(tenant, upload.id)
                assert found is None or found.file.data == upload.file.data
                if dice.random() < 0.3:
                    shop.store.delete(tenant, upload.id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    files = [one for owner in (A, B, C) for one in shop.store.all(owner)]
    assert shop.store.used == room(*[100] * len(files)) <= room(*[100] * 20)
