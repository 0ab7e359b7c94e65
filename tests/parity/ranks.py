"""Ranks in processes of their own, over gloo on loopback, that take every call this process makes
to its own part of a model: it is rank 0 itself."""

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch

from engine.cost import CostModel
from engine.network import LOOPBACK, use_interface
from engine.plan import StepPlan, StepResult
from engine.runner import ModelRunner
from model.parallel import Group, join
from tests.standin import Device, standin
from wire.channel import Buffer
from wire.messages import EngineRequest, Ready
from wire.settings import EngineSettings

CPU = torch.device("cpu")


class Workers:
    """Processes that ``meet`` makes ranks of, more than once; for CUDA each with its stand-in."""

    def __init__(self, count: int, device: torch.device = CPU) -> None:
        self._device = device
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, device.type), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def do(self, action: Callable[[], None], size: int) -> None:
        """Have the ranks of a group of so many, but this one, call a function of a module."""
        for pipe in self._pipes[: size - 1]:
            pipe.send(("do", (action,)))

    def ask(self, question: Callable[[Group], Any], own: Group) -> list[Any]:
        """What a function of a module answers about each rank's group."""
        pipes = self._pipes[: own.size * own.stages - 1]
        for pipe in pipes:
            pipe.send(("group", (question,)))
        return [question(own), *(pipe.recv() for pipe in pipes)]

    def meet(self, size: int, stages: int = 1) -> tuple[Group, list[Connection]]:
        """A group of so many ranks in all, and the pipes to all but this one."""
        listener = socket.create_server((LOOPBACK, 0))
        pipes = self._pipes[: size - 1]
        for rank, pipe in enumerate(pipes, 1):
            pipe.send(("join", (rank, size, listener.getsockname(), self._device, None, stages)))
        with mock.patch.dict(os.environ):  # what other tests start must not know of it
            use_interface(LOOPBACK)
            address = listener.getsockname()
            return join(0, size, address, self._device, listener, stages), pipes

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()


class Together:
    """A Runner: each call goes to all ranks."""

    def __init__(self, group: Group, pipes: Sequence[Connection], settings: EngineSettings) -> None:
        self._pipes = pipes
        self._tell("load", settings)
        self.own = ModelRunner(settings, group=group)

    def _tell(self, name: str, *arguments: Any) -> None:
        for pipe in self._pipes:
            pipe.send((name, arguments))

    def ask(self, question: Callable[[ModelRunner], Any]) -> list[Any]:
        """What a function of a module answers about each rank's part."""
        self._tell("ask", question)
        return [question(self.own), *(pipe.recv() for pipe in self._pipes)]

    def ready(self) -> Ready:
        return self.own.ready()

    def prepare(self, request: EngineRequest) -> Future[object] | None:
        return self.own.prepare(request)

    def cost(self) -> CostModel | None:
        return None

    def upload(self, request: EngineRequest, buffers: Sequence[Buffer]) -> None:
        for pipe in self._pipes[: self.own._group.size - 1]:  # of the first stage
            pipe.send(("upload", (request, buffers)))
        self.own.upload(request, buffers)

    def begin(self, plan: StepPlan) -> None:
        self._tell("begin", plan)
        self.own.begin(plan)

    def sample(self) -> None:
        self._tell("sample")
        self.own.sample()

    def finish(self) -> StepResult:
        self._tell("finish")
        return self.own.finish()


@contextlib.contextmanager
def beside_the_host(settings: EngineSettings) -> Iterator[tuple[Device, Together]]:
    """Two ranks, or stages, on devices of main memory: this process's, and a runner of both."""
    with (
        contextlib.closing(Workers(1, torch.device("cuda", 0))) as workers,
        standin() as device,
        contextlib.ExitStack() as stack,
    ):
        group, pipes = workers.meet(2, settings.pipeline_parallel_size)
        stack.callback(group.leave)  # or no later test could meet
        ranks = Together(group, pipes, settings)
        device.waits.clear()
        yield device, ranks


def _work(pipe: Connection, device: str) -> None:
    use_interface(LOOPBACK)
    with standin() if device == "cuda" else contextlib.nullcontext():
        _obey(pipe)


def _obey(pipe: Connection) -> None:
    group, runner = Group(), None
    try:
        while True:
            name, arguments = pipe.recv()
            if name == "join":
                group.leave()
                group = join(*arguments)
            elif name == "load":
                runner = ModelRunner(*arguments, group=group)
            elif name == "do":
                arguments[0]()
            elif name == "group":
                pipe.send(arguments[0](group))
            elif name == "ask":
                pipe.send(arguments[0](runner))
            else:
                getattr(runner, name)(*arguments)
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # rank 0 sees the connections close
