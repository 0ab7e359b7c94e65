"""Who gets a place among the processes of a model, at real sockets."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from engine import door, network
from engine.door import Place, RanksMissing, gather
from engine.node import Host, Node
from engine.orders import Refusal, ToRank
from tests.servers import free_port
from wire import handshake
from wire.channel import Channel
from wire.handshake import CALL, CHALLENGE, PROOF, Offer, read_secret
from wire.messages import Progress
from wire.settings import EngineSettings, SettingError

SECRET = b"sixteen or more of them"
DEADLINE = 60.0
GOOD = Offer(1, 0, 2, handshake.version())

Found = dict[Place, socket.socket]


class House:
    """A leader that awaits the two processes of one other host."""

    def __init__(self, folder: Path, timeout: float = DEADLINE) -> None:
        (folder / "secret").write_bytes(SECRET + b"\n")
        self.port = free_port()
        settings = EngineSettings(
            tensor_parallel_size=4,
            nodes=2,
            rank_host="127.0.0.1",
            rank_port=self.port,
            rank_timeout=timeout,
            rank_secret_file=str(folder / "secret"),
        )
        self.heard: list[Progress] = []
        self._open = threading.Event()
        self._stack = contextlib.ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(1))
        self._found: Future[Found] = self._pool.submit(gather, settings, self._hear)
        assert self._open.wait(DEADLINE)

    def _hear(self, progress: Progress) -> None:
        self.heard.append(progress)
        self._open.set()

    def knock(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), DEADLINE)
        return self._stack.enter_context(sock)

    def come(self, offer: Offer, secret: bytes = SECRET) -> socket.socket:
        """Say all that a process says; what is answered is left to read."""
        sock = self.knock()
        sock.sendall(handshake.call(secret, offer, read(sock, CHALLENGE)))
        return sock

    def found(self) -> Found:
        found = self._found.result(DEADLINE)
        for sock in found.values():
            self._stack.enter_context(sock)
        return found

    def close(self) -> None:
        self._stack.close()


def read(sock: socket.socket, size: int) -> bytes:
    """So many bytes, or as many as come before the end."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while len(found) < size and (piece := sock.recv(size - len(found))):
            found += piece
    return found


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.close()


def whole(house: House) -> None:
    """Let both come; each is the one that has its place."""
    mine = [house.come(GOOD), house.come(GOOD._replace(process=1))]
    for sock, (place, theirs) in zip(mine, sorted(house.found().items()), strict=True):
        assert len(read(sock, PROOF)) == PROOF
        theirs.settimeout(DEADLINE)
        theirs.sendall(b"%d" % place.process)
        assert read(sock, 1) == b"%d" % place.process


def test_who_knows_the_secret_gets_its_place_and_then_nobody_can_knock(house: House) -> None:
    whole(house)
    assert house.heard[0] == Progress("processes", 0, 2)
    with pytest.raises(ConnectionRefusedError):
        house.knock()


def test_strangers_take_no_place_and_delay_nobody(house: House) -> None:
    silent = [house.knock() for _ in range(20)]
    halves = [house.knock() for _ in range(20)]
    for sock in halves:
        sock.sendall(bytes(CALL // 2))
    web = house.knock()
    web.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 10)
    wrong = [house.come(GOOD._replace(process=i), b"another secret of theirs") for i in range(2)]
    for sock in (*wrong, web):
        assert len(read(sock, CHALLENGE + PROOF)) in (0, CHALLENGE)  # and then the end
    whole(house)
    for sock in (*silent, *halves):
        assert read(sock, CHALLENGE + 1)[CHALLENGE:] == b""


def test_however_many_strangers_wait_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_PATIENCE", 600.0)
    with contextlib.closing(House(tmp_path)) as house:
        crowd_around(house)


def crowd_around(house: House) -> None:
    crowd = [house.knock() for _ in range(300)]
    for sock in crowd[:100]:  # who has waited longest makes room
        assert len(read(sock, CHALLENGE + 1)) in (0, CHALLENGE)
    whole(house)


def test_each_who_stands_at_the_door_is_greeted_before_the_next_comes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = []

    def listen(host: str, port: int, backlog: int) -> socket.socket:
        listener = network.listen(host, port, backlog)
        crowd.extend(socket.create_connection((host, port), DEADLINE) for _ in range(50))
        return listener

    monkeypatch.setattr(door, "listen", listen)
    monkeypatch.setattr(door, "_STRANGERS", 3)
    with contextlib.closing(House(tmp_path)) as house:
        for sock in crowd:
            with sock:
                assert len(read(sock, CHALLENGE)) == CHALLENGE
        whole(house)


@pytest.mark.parametrize(
    ("offer", "why"),
    [
        (GOOD._replace(node=0), "there is no node 0 among 2"),
        (GOOD._replace(node=2), "there is no node 2 among 2"),
        (GOOD._replace(process=2), "there is no node 1 among 2"),
        (GOOD._replace(processes=1), "its host runs 1 processes, and the leader asks for 2"),
        (GOOD._replace(version="0.0.1"), "it is version 0.0.1, and the leader is "),
    ],
)
def test_who_does_not_fit_is_told_why(house: House, offer: Offer, why: str) -> None:
    sock = house.come(offer)
    read(sock, PROOF)
    message, _ = Channel[ToRank](sock, ToRank).receive()
    assert isinstance(message, Refusal)
    assert why in message.why
    whole(house)


def test_who_leaves_gives_up_its_place_and_who_is_missing_is_named(tmp_path: Path) -> None:
    house = House(tmp_path, timeout=4.0)
    with contextlib.closing(house):
        left = house.come(GOOD._replace(process=1))
        read(left, PROOF)
        left.close()
        house.come(GOOD)
        with pytest.raises(RanksMissing, match=r"1 of 2 .* 4 seconds .*: process 1 of node 1$"):
            house.found()


def test_a_process_that_comes_once_more_takes_the_place_of_the_former(house: House) -> None:
    former = house.come(GOOD)
    read(former, PROOF)
    sock = house.come(GOOD)
    read(sock, PROOF)
    assert read(former, 1) == b""
    house.come(GOOD._replace(process=1))
    house.found()[Place(1, 0)].sendall(b"!")
    assert read(sock, 1) == b"!"


def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = EngineSettings(
            tensor_parallel_size=2,
            nodes=2,
            rank_host="127.0.0.1",
            rank_port=taken.getsockname()[1],
            rank_secret_file=str(tmp_path / "secret"),
        )
        with pytest.raises(RanksMissing, match=r"rank_port .* in use"):
            gather(settings, lambda _: None)


def test_what_was_said_once_proves_nothing_a_second_time() -> None:
    first, second = handshake.challenge(), handshake.challenge()
    called = handshake.call(SECRET, GOOD, first)
    assert handshake.hear(SECRET, first, called) == GOOD
    assert handshake.hear(SECRET, second, called) is None
    for at in range(len(called)):
        changed = called[:at] + bytes([called[at] ^ 1]) + called[at + 1 :]
        assert handshake.hear(SECRET, first, changed) is None


def test_a_leader_that_does_not_know_the_secret_is_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        host = Host("127.0.0.1", port, 1, 1, "", str(tmp_path / "secret"), "info", "text")
        node = Node(host)
        node.start()
        listener.settimeout(DEADLINE)
        for answered in ("nothing", "what was said", "a guess"):
            sock, _ = listener.accept()
            with sock:
                challenged = handshake.challenge()
                sock.sendall(challenged)
                called = read(sock, CALL)
                if answered == "what was said":
                    sock.sendall(called[-PROOF:])
                if answered == "a guess":
                    sock.sendall(handshake.answer(b"another secret of theirs", challenged, called))
                if answered != "nothing":
                    assert read(sock, 1) == b""
        sock, _ = listener.accept()  # it tries again: no process was started for any of these
        sock.close()
        assert not node.children
    end_of(node)


def end_of(node: Node) -> None:
    """Its threads end when it leaves, and dial nobody any more."""
    node.leave()
    for thread in threading.enumerate():
        if thread.name.startswith("process "):
            thread.join(DEADLINE)
            assert not thread.is_alive()


def test_a_node_that_cannot_start_a_process_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr("engine.node.subprocess.Popen", fail)
    (tmp_path / "secret").write_bytes(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        node = Node(Host("127.0.0.1", port, 1, 1, "", str(tmp_path / "secret"), "info", "text"))
        node.start()
        listener.settimeout(DEADLINE)
        for _ in range(2):
            sock, _ = listener.accept()
            with sock:
                challenged = handshake.challenge()
                sock.sendall(challenged)
                called = read(sock, CALL)
                sock.sendall(handshake.answer(SECRET, challenged, called))
                assert read(sock, 1) == b""
    end_of(node)


@pytest.mark.parametrize("text", [None, b"", b"only fifteen of", b"  fifteen of them  \n"])
def test_a_secret_is_a_file_with_sixteen_bytes(tmp_path: Path, text: bytes | None) -> None:
    file = tmp_path / "secret"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(SettingError, match="rank_secret_file"):
        read_secret(str(file))
    file.write_bytes(b" sixteen of those\n")
    assert read_secret(str(file)) == b"sixteen of those"
