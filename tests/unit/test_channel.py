"""Framed messages: both ends, over real socket pairs."""

import asyncio
import socket
import struct
import threading
import tracemalloc
from collections.abc import Iterator

import msgspec
import pytest

from wire.channel import AsyncChannel, Bounds, Channel, ChannelClosed

DEADLINE = 60.0


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    number: int


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    text: str


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


def test_messages_and_buffers_arrive_in_order(pair: Pair) -> None:
    left, right = Channel[Ping](pair[0], Ping), Channel[Ping](pair[1], Ping)
    left.send(Ping(1))
    left.send(Ping(2), [b"", b"abc", bytearray(5), memoryview(b"xyz")])
    assert right.receive() == (Ping(1), [])
    assert right.receive() == (Ping(2), [b"", b"abc", bytes(5), b"xyz"])


def test_a_union_comes_out_as_the_type_that_went_in(pair: Pair) -> None:
    left, right = Channel[Ping](pair[0], Ping), Channel[Ping | Pong](pair[1], Ping | Pong)
    left.send(Pong("hello"))
    left.send(Ping(7))
    assert [right.receive()[0], right.receive()[0]] == [Pong("hello"), Ping(7)]


def test_buffers_larger_than_the_socket_arrive_whole(pair: Pair) -> None:
    left, right = Channel[Ping](pair[0], Ping), Channel[Ping](pair[1], Ping)
    buffer = bytes(range(256)) * (1 << 14)
    sender = threading.Thread(target=left.send, args=(Ping(1), [buffer, buffer]))
    sender.start()
    message, buffers = right.receive()
    sender.join(DEADLINE)
    assert message == Ping(1)
    assert buffers == [buffer, buffer]


def test_a_buffer_of_larger_items_travels_as_its_bytes(pair: Pair) -> None:
    left, right = Channel[Ping](pair[0], Ping), Channel[Ping](pair[1], Ping)
    left.send(Ping(1), [memoryview(struct.pack("4I", 1, 2, 3, 4)).cast("I")])
    assert right.receive()[1] == [struct.pack("4I", 1, 2, 3, 4)]


def test_senders_in_several_threads_do_not_mix_their_frames(pair: Pair) -> None:
    left, right = Channel[Ping](pair[0], Ping), Channel[Ping](pair[1], Ping)

    def send(number: int) -> None:
        for _ in range(50):
            left.send(Ping(number), [bytes([number]) * 3000])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        message, (buffer,) = right.receive()
        assert buffer == bytes([message.number]) * 3000
    for thread in threads:
        thread.join(DEADLINE)


def test_the_peers_end_is_noticed_by_both_directions(pair: Pair) -> None:
    left, right = Channel[Ping](pair[0], Ping), Channel[Ping](pair[1], Ping)
    right.close()
    with pytest.raises(ChannelClosed):
        left.receive()
    with pytest.raises(ChannelClosed):
        left.send(Ping(1))


def test_closing_wakes_a_receive_in_another_thread(pair: Pair) -> None:
    channel = Channel[Ping](pair[0], Ping)
    ended = threading.Event()

    def receive() -> None:
        with pytest.raises(ChannelClosed):
            channel.receive()
        ended.set()

    thread = threading.Thread(target=receive)
    thread.start()
    channel.close()
    assert ended.wait(DEADLINE)
    thread.join(DEADLINE)


BAD_FRAMES = {
    "garbage payload": struct.pack("<II", 3, 0) + b"\xff\xff\xff",
    "another type": struct.pack("<II", 1, 0) + b"\x01",
    "an unknown tag": struct.pack("<II", 12, 0) + msgspec.msgpack.encode({"type": "rogue"}),
    "a huge payload": struct.pack("<II", 2_000_000_000, 0),
    "a huge buffer": struct.pack("<II", 17, 1)
    + msgspec.msgpack.encode(Ping(1))
    + struct.pack("<Q", 1 << 60),
    "half a header": b"\x01\x00",
    "half a payload": struct.pack("<II", 100, 0) + b"half",
    "half a buffer": struct.pack("<II", 19, 1) + msgspec.msgpack.encode(Ping(1)) + b"\x05",
}


@pytest.mark.parametrize("frame", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_what_is_not_a_frame_closes_the_channel(pair: Pair, frame: bytes) -> None:
    pair[0].sendall(frame)
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelClosed):
        Channel[Ping](pair[1], Ping, limit=1 << 20).receive()


@pytest.mark.parametrize("frame", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
async def test_what_is_not_a_frame_closes_the_asyncio_end(pair: Pair, frame: bytes) -> None:
    pair[0].sendall(frame)
    pair[0].shutdown(socket.SHUT_WR)
    channel: AsyncChannel[Ping] = await AsyncChannel.open(pair[1], Ping, limit=1 << 20)
    with pytest.raises(ChannelClosed):
        await asyncio.wait_for(channel.receive(), DEADLINE)
    channel.close()


async def test_the_two_ends_understand_each_other(pair: Pair) -> None:
    blocking = Channel[Ping](pair[0], Ping)
    channel: AsyncChannel[Ping] = await AsyncChannel.open(pair[1], Ping)
    buffer = bytes(3 << 20)

    def echo() -> None:
        message, buffers = blocking.receive()
        blocking.send(Ping(message.number + 1), buffers)

    thread = threading.Thread(target=echo)
    thread.start()
    await channel.send(Ping(1), [buffer, b"end"])
    message, buffers = await asyncio.wait_for(channel.receive(), DEADLINE)
    thread.join(DEADLINE)
    assert (message, buffers) == (Ping(2), [buffer, b"end"])
    channel.close()


async def test_sending_waits_while_the_peer_does_not_read(pair: Pair) -> None:
    channel: AsyncChannel[Ping] = await AsyncChannel.open(pair[0], Ping)
    sending = asyncio.create_task(channel.send(Ping(1), [bytes(8 << 20)]))
    done, _ = await asyncio.wait([sending], timeout=0.1)
    assert not done
    blocking = Channel[Ping](pair[1], Ping)
    _, (buffer,) = await asyncio.to_thread(blocking.receive)
    await asyncio.wait_for(sending, DEADLINE)
    assert len(buffer) == 8 << 20
    channel.close()


async def test_what_waits_to_be_sent_is_not_copied(pair: Pair) -> None:
    channel: AsyncChannel[Ping] = await AsyncChannel.open(pair[0], Ping)
    buffer = bytes(64 << 20)
    tracemalloc.start()
    try:
        sending = asyncio.create_task(channel.send(Ping(1), [buffer]))
        done, _ = await asyncio.wait([sending], timeout=0.1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not done
    assert peak < 4 << 20
    sending.cancel()
    await asyncio.wait([sending])
    channel.close()


async def test_the_asyncio_end_notices_a_peer_that_leaves(pair: Pair) -> None:
    channel: AsyncChannel[Ping] = await AsyncChannel.open(pair[0], Ping)
    receiving = asyncio.create_task(channel.receive())
    await asyncio.sleep(0)
    pair[1].close()
    with pytest.raises(ChannelClosed):
        await asyncio.wait_for(receiving, DEADLINE)

    async def send_much() -> None:
        for _ in range(10):
            await channel.send(Ping(1), [bytes(1 << 20)])

    with pytest.raises(ChannelClosed):
        await asyncio.wait_for(send_much(), DEADLINE)
    channel.close()


BEYOND_BOUNDS = {
    "a long message": struct.pack("<II", 101, 0),
    "many buffers": struct.pack("<II", 1, 3),
    "much in all": struct.pack("<II", 1, 1) + b"x" + struct.pack("<Q", 1 << 10),
}


@pytest.mark.parametrize("frame", BEYOND_BOUNDS.values(), ids=BEYOND_BOUNDS.keys())
async def test_one_frame_can_be_bound_more_tightly(pair: Pair, frame: bytes) -> None:
    channel: AsyncChannel[Ping] = await AsyncChannel.open(pair[1], Ping)
    pair[0].sendall(frame)
    with pytest.raises(ChannelClosed, match="larger"):
        await asyncio.wait_for(channel.receive(Bounds(100, 2, 1 << 10)), DEADLINE)
    channel.close()


def test_an_error_does_not_quote_the_peer(pair: Pair) -> None:
    Channel[Ping](pair[0], Ping).send({"type": "line\nline"})
    with pytest.raises(ChannelClosed) as caught:
        Channel[Ping](pair[1], Ping).receive()
    assert "line" not in str(caught.value)
