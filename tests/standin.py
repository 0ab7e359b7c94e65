"""A CUDA device made of main memory: what has to be right before a device computes anything.

Within ``standin()`` tensors of ``cuda`` are ``Remote``. What is done with them is computed at once,
by the CPU, but a program finds no more than CUDA promises:

- Operands lie on one device, but for those of no dimension. Ranks meet over gloo.
- A copy to the host that nobody has waited for is not there: until the device, or an event that was
  recorded behind the copy, is waited for, the host finds ``GARBAGE``.
- A copy from pinned memory may take as long, and the memory must not change meanwhile.
- A graph does again what was captured, with the memory that was captured: what the host computed
  beside it stays what it was. Capturing itself computes nothing that is found later, and allows no
  waiting; what is captured must not be given back. Triton's kernels are part of it, under its
  interpreter.
- What makes the host wait for the device is counted in ``Device.waits``, with who did it; memory
  is counted too. What is captured keeps all it ever had.

It says nothing of kernels that others compile for a device, of time, of streams beside the one that
does everything, or of memory that graphs share.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import sys
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

GARBAGE = 0x55
_CUDA = torch.device("cuda", 0)
_ATEN = torch.ops.aten
_COPIES = {_ATEN._to_copy.default, _ATEN.copy_.default, _ATEN._pin_memory.default}
# What they give, or its shape, is only known when the device has come so far.
_WAITING = {
    _ATEN._local_scalar_dense.default,
    _ATEN.equal.default,
    _ATEN.allclose.default,
    _ATEN.bincount.default,
    _ATEN.repeat_interleave.Tensor,
    _ATEN.is_nonzero.default,
    _ATEN.masked_select.default,
    _ATEN.nonzero.default,
    _ATEN._unique2.default,
    _ATEN.unique_consecutive.default,
    _ATEN.unique_dim.default,
}
# One kernel, on a device and on the CPU; written out it would take the memory of all scores.
_ATTENTION = _ATEN.scaled_dot_product_attention.default
_MASKS = {torch.bool, torch.uint8}
_INDEXING = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}


class Remote(Tensor):
    """A tensor of the device; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Remote":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made: Remote = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, dtype=held.dtype, device=_CUDA, **layout
        )
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        pass

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise AssertionError(f"{func} where there is no device")


@dataclasses.dataclass
class _Copy:
    """One that is under way; ``was`` is what is copied."""

    was: Tensor
    source: Tensor | None = None  # on the host
    target: Tensor | None = None  # on the host

    def arrive(self) -> None:
        if self.target is not None:
            self.target.copy_(self.was)
        elif not torch.equal(_bytes(self.source), _bytes(self.was)):
            raise AssertionError("memory of the host changed while it was being copied")


@dataclasses.dataclass
class _Call:
    """What a graph does again."""

    run: Callable[..., Any]
    args: Any
    kwargs: Any
    read: list[Tensor]
    made: list[Tensor]  # results with memory of their own

    def again(self) -> None:
        result = self.run(*self.args, **self.kwargs)
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.ScriptObject):  # a collective's
                leaf.wait()  # type: ignore[attr-defined]
        found = _own(result, (self.args, self.kwargs))
        for old, new in zip(self.made, found, strict=True):
            old.copy_(new)


def _bytes(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.contiguous().view(-1).view(torch.uint8)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _own(found: Any, given: Any) -> list[Tensor]:
    """The tensors of a result that are not parts of what was given."""
    taken = {_memory(one) for one in _tensors(given)}
    return [one for one in _tensors(found) if _memory(one) not in taken]


def _is_cuda(device: Any) -> bool:
    return torch.device(device).type == "cuda"


class Device(TorchDispatchMode):
    """Where torch's operations end up."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.replays = 0
        self.strict = False  # as with torch.cuda.set_sync_debug_mode("error")
        self.total = 2 << 30  # bytes of memory
        self.allocated = self.peak = 0
        self._under_way: list[_Copy] = []
        self._arrived = 0
        self._recording: list[_Call] | None = None
        # Memory that is captured, and what was in it.
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._pinned: dict[int, Tensor] = {}  # kept, so that no other memory is taken for it
        self._named: dict[int, weakref.WeakSet[Remote]] = {}
        self._counted: set[int] = set()

    @property
    def copies(self) -> int:
        """How many were begun."""
        return self._arrived + len(self._under_way)

    def wait(self, why: str, copies: int | None = None) -> None:
        """Let copies arrive: the first so many that were begun, or all."""
        if self._recording is not None or (self.strict and copies is None):
            raise RuntimeError(f"this waits for the device: {why}")
        self.waits[f"{why} in {_asker()}"] += 1
        count = self.copies if copies is None else copies
        arriving = self._under_way[: max(0, count - self._arrived)]
        del self._under_way[: len(arriving)]
        self._arrived += len(arriving)
        for copy in arriving:
            copy.arrive()

    def has(self, copies: int) -> bool:
        """Whether so many have arrived."""
        return self._arrived >= copies

    def __torch_dispatch__(
        self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _COPIES:
            return self._copy(func, args, kwargs)
        if func is _ATEN.is_pinned.default:
            return self._is_pinned(args[0])
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if func is not _ATTENTION and func.has_kernel_for_dispatch_key(composite):
            with self:
                return func.decompose(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and _is_cuda(device):  # made, perhaps in the likeness of another
            return self.launch(func, args, kwargs | {"device": torch.device("cpu")}, mixed=True)
        if device is None and any(isinstance(one, Remote) for one in _tensors((args, kwargs))):
            return self.launch(func, args, kwargs)
        pinned = kwargs.pop("pin_memory", None)
        found = func(*args, **kwargs)
        return self._pin(found) if pinned else found

    def launch(
        self, run: Callable[..., Any], args: Any, kwargs: Any, *, mixed: bool = False
    ) -> Any:
        """Compute something of tensors of the device, and of others if ``mixed``."""
        leaves, spec = tree_flatten((args, kwargs))
        there = [leaf for leaf in leaves if isinstance(leaf, Remote)]
        is_kernel = not isinstance(run, torch._ops.OpOverload)
        for one in _tensors(leaves):
            if not (mixed or isinstance(one, Remote)) and (one.dim() or is_kernel):
                raise RuntimeError(f"{run}: {list(one.shape)} of the host among the device's")
        masks = run in _INDEXING and any(one.dtype in _MASKS for one in _tensors(args[1]))
        if run in _WAITING or masks:
            self.wait(str(run))
        names = {id(one.held): one for one in there}
        held = [self._given(leaf) for leaf in leaves]
        args, kwargs = tree_unflatten(held, spec)
        read = [one.held for one in there]
        if self._recording is not None:
            for one in read:
                if _memory(one) not in self._before:
                    storage = one.untyped_storage()
                    self._before[_memory(one)] = storage, storage.clone()
        found = run(*args, **kwargs)
        if self._recording is not None:
            made = _own(found, held)
            for one in made:
                storage = one.untyped_storage()
                self._before[_memory(one)] = storage, storage.clone().fill_(GARBAGE)
            self._recording.append(_Call(run, args, kwargs, read, made))

        def named(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            return names[id(one)] if id(one) in names else self._name(one)

        return tree_map(named, found)

    def _given(self, leaf: Any) -> Any:
        if isinstance(leaf, Remote):
            return leaf.held
        # A graph has the value that is of the host now.
        return leaf.clone() if self._recording is not None and isinstance(leaf, Tensor) else leaf

    def _name(self, held: Tensor) -> Remote:
        memory, storage = _memory(held), held.untyped_storage()
        if memory not in self._counted:
            self._counted.add(memory)
            self.allocated += storage.nbytes()
            self.peak = max(self.peak, self.allocated)
            weakref.finalize(storage, self._give_back, memory, storage.nbytes())
        with torch.inference_mode(False):  # what it is a view of may be no tensor of inference
            made = Remote(held)
        self._named.setdefault(memory, weakref.WeakSet()).add(made)
        return made

    def _give_back(self, memory: int, size: int) -> None:
        self._counted.remove(memory)
        self.allocated -= size

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[_memory(tensor)] = tensor
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self._pinned

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _ATEN._pin_memory.default:
            return self._pin(args[0].clone())
        target, source = args[:2] if func is _ATEN.copy_.default else (None, args[0])
        device = target.device if target is not None else kwargs.get("device") or source.device
        if isinstance(source, Remote) == _is_cuda(device):
            if not isinstance(source, Remote):
                return func(*args, **kwargs)
            return self.launch(func, args, {k: v for k, v in kwargs.items() if k != "device"})
        waits = not (kwargs.pop("non_blocking", False) or args[2:] == (True,))
        kwargs.pop("device", None)
        if isinstance(source, Remote):
            return self._to_host(source.held, target, waits, kwargs)
        strides, dtype = source.stride(), kwargs.get("dtype") or source.dtype
        if target is not None:
            strides, dtype = target.stride(), target.dtype
        # Otherwise the host first copies it to memory of its own, which is not pinned.
        alike = dtype == source.dtype and strides == source.stride()
        if waits or not (alike and _is_dense(source) and self._is_pinned(source)):
            self.wait("copy to the device")
        else:
            self._under_way.append(_Copy(source.clone(), source=source))
        there = self._name(source.clone())
        given = (there,) if target is None else (target, there)
        return self.launch(func, given, kwargs)

    def _to_host(
        self, held: Tensor, target: Tensor | None, waits: bool, kwargs: dict[str, Any]
    ) -> Tensor:
        if target is None:
            target = torch.ops.aten._to_copy(held, **kwargs)
            if not waits:
                self._pin(target)
        if waits or not self._is_pinned(target):
            self.wait("copy to the host")
            return target.copy_(held)
        assert self._recording is None, "a copy to the host in a graph"
        self._under_way.append(_Copy(held.clone(), target=target))
        garbage = torch.full((target.nbytes,), GARBAGE, dtype=torch.uint8)
        return target.copy_(garbage.view(target.dtype).view(target.shape))

    @contextlib.contextmanager
    def capture(self, graph: Any, **_: Any) -> Iterator[None]:
        """As ``torch.cuda.graph``: in the end nothing was computed yet."""
        self.wait("capture")
        self._recording = graph.calls = []
        try:
            yield
        finally:
            self._recording = None
            for storage, was in self._before.values():
                storage.copy_(was)
            self._before.clear()

    def replay(self, calls: list[_Call]) -> None:
        """Do again what was captured."""
        self.replays += 1
        own = {_memory(one) for call in calls for one in call.made}
        for call in calls:
            for one in call.read:
                if _memory(one) not in own and not self._named.get(_memory(one)):
                    raise AssertionError(f"a graph reads {list(one.shape)}, which was given back")
            call.again()


def _is_dense(tensor: Tensor) -> bool:
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense(tensor)
    return dense


def _asker() -> str:
    """The function that waits, outside of torch and of this file."""
    frame = sys._getframe(2)
    foreign = {"torch", "standin.py", "contextlib.py"}
    while frame.f_back and foreign & set(Path(frame.f_code.co_filename).parts):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}"


def _cuda(device: Device) -> dict[str, Any]:
    """What programs ask of ``torch.cuda``."""

    class Event:
        def __init__(self, enable_timing: bool = False, **_: Any) -> None:
            self._timed, self._behind, self._at = enable_timing, -1, 0.0

        def record(self, stream: Any = None) -> None:
            self._behind, self._at = device.copies, time.perf_counter()

        def synchronize(self) -> None:
            device.wait("event", self._behind)

        def query(self) -> bool:
            return device.has(self._behind)

        def elapsed_time(self, other: "Event") -> float:
            for event in (self, other):
                assert event._timed, "the event is not for timing"
                assert event._behind >= 0, "the event was not recorded"
                assert event.query(), "the device has not come so far"
            return (other._at - self._at) * 1e3

    class Stream:
        cuda_stream = 0

        def wait_stream(self, other: "Stream") -> None:
            pass

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record()
            return event

    class Graph:
        def replay(self) -> None:
            device.replay(self.calls)  # type: ignore[attr-defined]

    stream = Stream()
    about = types.SimpleNamespace(multi_processor_count=132, name="stand-in", major=9, minor=0)
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda which: None,
        "get_device_capability": lambda which=None: (9, 0),
        "get_device_name": lambda which=None: "stand-in",
        "get_device_properties": lambda which=None: about,
        "mem_get_info": lambda which=None: (device.total - device.allocated, device.total),
        "memory_allocated": lambda which=None: device.allocated,
        "max_memory_allocated": lambda which=None: device.peak,
        "reset_peak_memory_stats": lambda which=None: setattr(device, "peak", device.allocated),
        "empty_cache": lambda: None,
        "synchronize": lambda which=None: device.wait("device", device.copies),
        "get_sync_debug_mode": lambda: "error" if device.strict else "default",
        "set_sync_debug_mode": lambda mode: setattr(device, "strict", mode == "error"),
        "current_stream": lambda which=None: stream,
        "stream": lambda which: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": device.capture,
        "graph_pool_handle": lambda: (0, 1),
    }


class _Generator(torch.Generator):
    def __new__(cls, device: Any = None) -> Self:
        return super().__new__(cls)


class _Numbered(TorchFunctionMode):
    """Says which of the devices is meant: torch would ask CUDA."""

    def __torch_function__(
        self, func: Any, _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def numbered(one: Any) -> Any:
            return _CUDA if isinstance(one, str | torch.device) and str(one) == "cuda" else one

        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {key: numbered(value) for key, value in (kwargs or {}).items()}
        return func(*map(numbered, args), **kwargs)


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Some operations first make their device the current one, by what a build of torch with CUDA
    registers for that. Here it is what is registered for the CPU, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registered = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, registered[1] = registered[1], registered[0]
    # What torch.tensor makes then reaches the device by a copy that can be seen.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        registered[1] = before


@contextlib.contextmanager
def standin() -> Iterator[Device]:
    """Take the place of CUDA."""
    device, init = Device(), dist.init_process_group

    def over_gloo(backend: str, *, device_id: Any = None, **kwargs: Any) -> None:
        init("gloo" if backend == "nccl" else backend, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name, part in _cuda(device).items():
            patch.setattr(torch.cuda, name, part)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(dist, "init_process_group", over_gloo)
        if os.environ.get("TRITON_INTERPRET") == "1":
            from triton.runtime.interpreter import GridExecutor

            run = GridExecutor.__call__

            def call(kernel: Any, *args: Any, **kwargs: Any) -> Any:
                return device.launch(functools.partial(run, kernel), args, kwargs)

            patch.setattr(GridExecutor, "__call__", call)
        with _guarded(), _Numbered(), device:
            yield device
