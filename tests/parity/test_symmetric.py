"""Sums over memory that ranks share, on the CPU: torch's operations are called by their own schemas
and do over gloo what torch documents. Which of them is used for what, that all ranks decide alike,
and that what cannot be is left to the process group."""

import functools
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as memory

from engine import rank
from engine.orders import Join
from model import parallel, symmetric
from model.parallel import Group
from tests.checkpoints import make_checkpoint
from tests.parity import test_parallel
from tests.parity.ranks import CPU, Together, Workers
from wire.settings import EngineSettings

SMALL, LARGE = 64, 512  # numbers in one shot, and in the buffer
# In this process, which is a rank.
met: dict[int, str] = {}  # storages that are shared, and among whom
calls: list[str] = []
fault = ""
switch = 0


def parts(x: Tensor, group_name: str) -> list[Tensor]:
    group = torch._C._distributed_c10d._resolve_process_group(group_name)
    found = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(found, x, group=group)
    return found


def check(shared: Tensor, reduce_op: str, group_name: str) -> None:
    assert met[shared.untyped_storage().data_ptr()] == group_name
    assert reduce_op == "sum"
    assert shared.is_contiguous()
    assert shared.dtype == torch.bfloat16
    assert shared.nbytes % 16 == shared.storage_offset() * shared.itemsize % 16 == 0


def one_shot(symm_buffer: Tensor, local_input: Tensor, reduce_op: str, group_name: str) -> Tensor:
    check(symm_buffer, reduce_op, group_name)
    assert local_input.is_contiguous()
    assert local_input.storage_offset() * local_input.itemsize % 16 == 0
    assert symm_buffer.shape == local_input.shape
    assert local_input.untyped_storage().data_ptr() not in met
    calls.append("one-shot")
    symm_buffer.copy_(local_input)
    total, *others = parts(symm_buffer, group_name)
    for other in others:
        total = total + other
    return total + (fault == "wrong")


def two_shot(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    check(x, reduce_op, group_name)
    calls.append("two-shot")
    total, *others = parts(x, group_name)
    for other in others:
        total = total + other
    return x.copy_(total)


def multimem(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    check(x, reduce_op, group_name)
    assert switch, "it needs multicast"
    calls.append("multimem")
    return x.copy_(torch.stack(parts(x, group_name)).sum(0, dtype=torch.float32))


def empty(*size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    if fault == "full":
        raise RuntimeError("CUDA driver error: out of memory\nand where")
    made = torch.full(size, torch.nan, dtype=dtype, device=device)
    met[made.untyped_storage().data_ptr()] = ""
    return made


def rendezvous(tensor: Tensor, group: Any) -> Any:
    """Ranks wait for each other over the group's store, as torch's do."""
    if fault == "refused":
        raise RuntimeError("it cannot be imported")
    among = torch._C._distributed_c10d._resolve_process_group(group)
    store = among.get_group_store()
    store.set(f"met{among.rank()}", "")
    store.wait([f"met{rank}" for rank in range(among.size())])
    met[tensor.untyped_storage().data_ptr()] = group
    return SimpleNamespace(multicast_ptr=switch)


def reaches(device: torch.device, numbers: Any) -> None:
    if fault == "alone":
        raise RuntimeError("GPU 1 does not reach the memory of GPU 0")


REAL = (
    memory.empty, memory.rendezvous, symmetric._check_reach, symmetric._ONE_SHOT,
    symmetric._BUFFER, symmetric.DEVICES, parallel._MEETING,
)  # fmt: skip
library = torch.library.Library("symm_mem", "IMPL")


def put(*values: Any) -> None:
    memory.empty, memory.rendezvous, symmetric._check_reach, symmetric._ONE_SHOT = values[:4]
    symmetric._BUFFER, symmetric.DEVICES, parallel._MEETING = values[4:]


def pretend() -> None:
    """A CPU whose ranks share memory."""
    global fault, switch
    if not hasattr(library, "ready"):
        for name, function in zip(
            symmetric.OPERATIONS, (one_shot, two_shot, multimem), strict=True
        ):
            library.impl(name, function, "CPU")
        library.ready = True  # type: ignore[attr-defined]
    fault, switch = "", 0
    met.clear()  # others may have the memory by now
    put(empty, rendezvous, reaches, 2 * SMALL, 2 * LARGE, ("cuda", "cpu"), REAL[6])


def with_switch() -> None:
    global switch
    pretend()
    switch = 1


def for_a_model() -> None:
    """Steps of few rows are one kind, larger ones another, and the largest neither."""
    pretend()
    symmetric._ONE_SHOT, symmetric._BUFFER = (
        2 * rows * test_parallel.WIDE.size for rows in (4, 64)
    )


def stop() -> None:
    put(*REAL)


def hurry() -> None:
    """Wait for those who do not come for a second."""
    parallel._MEETING = REAL[6] / 60


def fails(how: str) -> None:
    global fault
    fault = how


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    found = Workers(3)
    yield found
    found.close()


@pytest.fixture
def pretending(workers: Workers) -> Iterator[None]:
    workers.do(pretend, 4)
    pretend()
    yield
    workers.do(stop, 4)
    stop()


SHAPES = {
    (8,): "one-shot",
    (4, 16): "one-shot",
    (5, 16): "two-shot",
    (32, 16): "two-shot",
    (33, 16): "",  # larger than the buffer
    (3, 5): "",  # not whole pieces of 16 bytes
    (0, 16): "",
}


def sums(group: Group) -> list[tuple[Tensor, list[str]]]:
    """What a rank gets for tensors that it knows of all ranks, and by which operations."""
    torch.manual_seed(group.rank)
    found = []
    for shape in SHAPES:
        calls.clear()
        found.append((group.sum(torch.randn(shape).bfloat16()), [*calls]))
    calls.clear()
    found.append((group.sum(torch.randn(4, 16)), [*calls]))  # of another type
    calls.clear()
    line = torch.randn(65).bfloat16()
    found.append((group.sum(line[1:]), [*calls]))  # begins within 16 bytes
    calls.clear()
    found.append((group.sum(torch.randn(16, 4).bfloat16().t()), [*calls]))  # not in order
    return found


def expected(size: int) -> list[Tensor]:
    inputs: list[list[Tensor]] = []
    for number in range(size):
        torch.manual_seed(number)
        each = [torch.randn(shape).bfloat16() for shape in SHAPES]
        each += [torch.randn(4, 16), torch.randn(65).bfloat16()[1:]]
        inputs.append([*each, torch.randn(16, 4).bfloat16().t()])
    return [torch.stack(tensors).double().sum(0) for tensors in zip(*inputs, strict=True)]


@pytest.mark.usefixtures("pretending")
@pytest.mark.parametrize(
    ("size", "stages", "switched"),
    [(2, 1, False), (4, 1, False), (4, 1, True), (2, 1, True), (4, 2, False)],
    ids=["two", "four", "four and a switch", "two and a switch", "two stages"],
)
def test_each_sum_is_made_by_what_suits_its_size(
    workers: Workers, caplog: pytest.LogCaptureFixture, size: int, stages: int, switched: bool
) -> None:
    if switched:
        workers.do(with_switch, size)
        with_switch()
    with caplog.at_level(logging.INFO, "model.symmetric"):
        group, _ = workers.meet(size, stages)
    # Of so few ranks each adds up faster than the switch does.
    large = "multimem" if switched and size == 4 else "two-shot"
    assert len(caplog.messages) == 1
    assert f"sums=symmetric_memory (one-shot to 0 KiB, {large} to" in caplog.text
    answers = workers.ask(sums, group)
    group.leave()
    kinds = [kind.replace("two-shot", large) for kind in SHAPES.values()] + ["", "", "one-shot"]
    totals = expected(size // stages)
    for found in answers:
        assert [used for _, used in found] == [[kind] if kind else [] for kind in kinds]
        for (ours, _), theirs, first in zip(found, totals, answers[0], strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours.double(), theirs, atol=0.1, rtol=0)
            assert torch.equal(ours, first[0])  # the same bits on all


@pytest.mark.usefixtures("pretending")
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("alone", "rank 2: GPU 1 does not reach the memory of GPU 0"),
        ("full", "rank 2: CUDA driver error: out of memory"),
        # The others wait for it until they give up.
        ("refused", "rank 0: wait timeout"),
        ("wrong", "rank 2: sums of [8, 64] numbers are wrong"),
    ],
)
def test_where_one_rank_cannot_none_does(
    workers: Workers, caplog: pytest.LogCaptureFixture, how: str, why: str
) -> None:
    if how == "refused":
        workers.do(hurry, 4)
        hurry()
    workers._pipes[1].send(("do", (functools.partial(fails, how),)))  # rank 2 of four
    with caplog.at_level(logging.INFO, "model.symmetric"):
        group, _ = workers.meet(4)
    answers = workers.ask(sums, group)
    assert [message[: len(why) + 11] for message in caplog.messages] == [f"sums=nccl ({why}"]
    for found in answers:
        assert not any(used for _, used in found)
        for (ours, _), theirs in zip(found, expected(4), strict=True):
            torch.testing.assert_close(ours.double(), theirs, atol=0.1, rtol=0)
    # Later waiting is as patient as ever.
    assert dist.distributed_c10d._get_default_store().timeout > 10 * REAL[6]
    group.leave()


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.usefixtures("pretending")
def test_a_model_answers_as_without_it(workers: Workers, tmp_path: Path, replayed: bool) -> None:
    folder = make_checkpoint(tmp_path, shape=test_parallel.WIDE)
    options = test_parallel.settings(folder, dtype="bfloat16", block_size=32)
    if replayed:
        workers.do(test_parallel.replay, 2)
        test_parallel.replay()
    found = []
    try:
        for shares, here in ((True, for_a_model), (False, stop)):
            workers.do(here, 2)
            here()
            group, pipes = workers.meet(2)
            calls.clear()
            found.append(test_parallel.answers(Together(group, pipes, options), options))
            assert set(calls) == ({"one-shot", "two-shot"} if shares else set())
            group.leave()
    finally:
        workers.do(test_parallel.compute, 2)
        test_parallel.compute()
    found[0].equal(found[1], 0)  # a sum of two is rounded once, whoever makes it


def look(places: list[tuple[int, int]]) -> None:
    symmetric.SharedSums(None, torch.device("cuda", 0), places).look()  # type: ignore[arg-type]


def test_what_speaks_against_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: other < 2)
    look([(7, 0), (7, 1)])
    with pytest.raises(RuntimeError, match="several hosts"):
        look([(7, 0), (8, 1)])
    with pytest.raises(RuntimeError, match="do not number their GPUs alike"):
        look([(7, 0), (7, 0)])
    with pytest.raises(RuntimeError, match="GPU 0 does not reach the memory of GPU 2"):
        look([(7, 0), (7, 1), (7, 2)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    with pytest.raises(RuntimeError, match="T4 does not add in bfloat16"):
        look([(7, 0), (7, 1)])
    monkeypatch.setattr(symmetric, "OPERATIONS", ("all_reduce_of_tomorrow",))
    with pytest.raises(RuntimeError, match="has no all_reduce_of_tomorrow"):
        look([(7, 0), (7, 1)])


def test_torch_has_what_is_called() -> None:
    of_all = [("reduce_op", "str"), ("group_name", "str")]
    arguments = {
        "one_shot_all_reduce_copy": [("symm_buffer", "Tensor"), ("local_input", "Tensor"), *of_all],
        "two_shot_all_reduce_": [("input", "Tensor"), *of_all],
        "multimem_all_reduce_": [("input", "Tensor"), *of_all],
    }
    assert set(arguments) == set(symmetric.OPERATIONS)
    for name, wanted in arguments.items():
        schema = getattr(torch.ops.symm_mem, name).default._schema
        assert [(a.name, str(a.type)) for a in schema.arguments] == wanted
        assert [str(r.type) for r in schema.returns] == ["Tensor"]
    inspect.signature(memory.empty).bind(8, dtype=torch.bfloat16, device=CPU)
    inspect.signature(memory.rendezvous).bind(torch.empty(0), "group")
    assert hasattr(memory._SymmetricMemory, "multicast_ptr")
    assert hasattr(dist.ProcessGroup, "group_name")


def test_the_setting_turns_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path)
    asked = []

    def join(*_: Any, share_memory: bool) -> None:
        asked.append(share_memory)
        raise RuntimeError("enough")

    monkeypatch.setattr(parallel, "join", join)
    for value in (True, False):
        options = EngineSettings(str(folder), device="cpu", symmetric_memory=value)
        order = Join(options, 0, 2, 0, 2, ("", 0), "", "info", "text")
        with pytest.raises(RuntimeError, match="enough"):
            rank.load_part(order, lambda _: None)
    assert asked == [True, False]
