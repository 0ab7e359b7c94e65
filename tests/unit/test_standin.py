"""The stand-in for CUDA refuses what CUDA refuses, and promises no more."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.standin import GARBAGE, Device, standin


@pytest.fixture
def device() -> Iterator[Device]:
    with standin() as device:
        yield device


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


def waited(device: Device) -> list[str]:
    """What waited for the device since the last time."""
    found = [why.rpartition(" in ")[0] for why in device.waits]
    device.waits.clear()
    return found


def test_cuda_is_there_only_meanwhile() -> None:
    before = torch.cuda.is_available()
    with standin():
        assert torch.cuda.is_available()
        assert ones(2).is_cuda
    assert torch.cuda.is_available() == before


def test_it_computes(device: Device) -> None:
    x = torch.arange(6, device="cuda").view(2, 3).float()
    x[0] = 5
    x += torch.tensor(1.0)  # of no dimension, from anywhere
    with torch.inference_mode():
        found = torch.nn.functional.linear(x, ones(1, 3))
    found.bool()[torch.zeros(1, dtype=torch.long, device="cuda")] = ones(1).bool()
    assert waited(device) == []
    assert found.tolist() == [[18.0], [15.0]]
    assert float(found.sum()) == 33.0
    assert waited(device) == ["copy to the host", "aten._local_scalar_dense.default"]


def test_operands_lie_on_one_device(device: Device) -> None:
    with pytest.raises(RuntimeError, match="of the host among the device's"):
        ones(3) + torch.ones(3)
    with pytest.raises(RuntimeError, match="of the host among the device's"):
        ones(3)[torch.tensor([0, 1], device="cpu")]
    with pytest.raises(RuntimeError, match="numpy"):
        ones(3).numpy()


def test_what_is_copied_to_the_host_is_there_once_it_was_waited_for(device: Device) -> None:
    host = torch.empty(2, dtype=torch.uint8, pin_memory=True)
    there = torch.tensor([1, 2], dtype=torch.uint8, device="cuda")
    waited(device)
    before = torch.cuda.current_stream().record_event()
    host.copy_(there, non_blocking=True)
    behind = torch.cuda.current_stream().record_event()
    there.zero_()
    before.synchronize()
    assert host.tolist() == [GARBAGE, GARBAGE]
    assert not behind.query()
    behind.synchronize()
    assert host.tolist() == [1, 2]
    assert waited(device) == ["event"]
    assert there.to("cpu", non_blocking=True).tolist() == [GARBAGE, GARBAGE]
    turned = torch.zeros(3, 2, dtype=torch.uint8, device="cuda").T
    assert turned.to("cpu", non_blocking=True).tolist() == [[GARBAGE] * 3] * 2


def test_copies_to_the_device_wait_unless_they_are_pinned_and_as_they_are(device: Device) -> None:
    pinned = torch.ones(2, 3).pin_memory()
    assert pinned.is_pinned()
    for part in (pinned, pinned[1:], pinned.T):
        part.to("cuda", non_blocking=True)
    assert waited(device) == []
    ones(2, 3).copy_(pinned.T.contiguous().T, non_blocking=True)
    assert waited(device) == ["copy to the device"]
    for part in (pinned[:, :2], pinned.clone()):
        part.to("cuda", non_blocking=True)
        assert waited(device) == ["copy to the device"]
    pinned.to("cuda", torch.float64, non_blocking=True)
    pinned.to("cuda")
    assert sum(device.waits.values()) == 2


def test_memory_must_not_change_while_it_is_copied(device: Device) -> None:
    host = torch.ones(2).pin_memory()
    host.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    host += 1
    host.to("cuda", non_blocking=True)
    host += 1
    with pytest.raises(AssertionError, match="changed while it was being copied"):
        torch.cuda.synchronize()


def capture(x: Tensor, factor: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = x[:2] * factor
        made = torch.empty_like(doubled)
        made.copy_(doubled)
        made += 1
    return graph, made


def test_a_graph_does_again_what_was_captured(device: Device) -> None:
    x = ones(3)
    graph, made = capture(x, 2)
    x.fill_(10)
    assert made.tolist() != [3.0, 3.0]
    graph.replay()
    assert made.tolist() == [21.0, 21.0]
    assert device.replays == 1


def test_capturing_computes_nothing(device: Device) -> None:
    x = ones(3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x[1:] += 1
        doubled = x * 2
    assert x.tolist() == [1.0, 1.0, 1.0]
    assert 4.0 not in doubled.tolist()
    graph.replay()
    assert (x.tolist(), doubled.tolist()) == ([1.0, 2.0, 2.0], [2.0, 4.0, 4.0])


def test_a_graph_has_the_hosts_numbers_as_they_were(device: Device) -> None:
    x, number = ones(2), torch.tensor(2.0, device="cpu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = x * number
    number.fill_(100)
    graph.replay()
    assert made.tolist() == [2.0, 2.0]


def test_a_graph_reads_nothing_that_was_given_back(device: Device) -> None:
    x = ones(3)
    graph, made = capture(x, 2)
    part = x[1:]
    del x
    graph.replay()
    del part
    with pytest.raises(AssertionError, match="given back"):
        graph.replay()
    assert made.tolist() == [3.0, 3.0]


def test_nothing_waits_while_a_graph_is_captured(device: Device) -> None:
    x, numbers = ones(2), torch.arange(2, device="cuda")
    for wait in (
        x.tolist,
        x.nonzero,
        numbers.bincount,
        lambda: x.repeat_interleave(numbers),
        lambda: x.allclose(x),
        lambda: x[x > 0],
        lambda: torch.tensor([1.0], device="cuda"),
        torch.cuda.synchronize,
    ):
        with (
            pytest.raises(RuntimeError, match="waits for the device"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            wait()
    x.tolist()


def test_waiting_can_be_made_an_error(device: Device) -> None:
    x = ones(2)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="waits for the device"):
        x.sum().item()
    torch.cuda.current_stream().record_event().synchronize()
    torch.cuda.set_sync_debug_mode("default")
    assert x.sum().item() == 2


def test_times_are_of_events_that_were_made_for_it(device: Device) -> None:
    timed = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for event in timed:
        event.record()
    assert timed[0].elapsed_time(timed[1]) >= 0
    untimed = torch.cuda.current_stream().record_event()
    with pytest.raises(AssertionError, match="not for timing"):
        timed[0].elapsed_time(untimed)


def test_memory_is_counted(device: Device) -> None:
    x = ones(1000)
    part = x[10:20]
    y = x + 1
    assert torch.cuda.memory_allocated() == 8000
    del x, y
    assert torch.cuda.memory_allocated() == 4000  # of which a part is held
    assert torch.cuda.max_memory_allocated() == 8000
    torch.cuda.reset_peak_memory_stats()
    del part
    free, total = torch.cuda.mem_get_info()
    assert free == total
    assert torch.cuda.max_memory_allocated() == 4000
