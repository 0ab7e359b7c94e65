"""Sums of tensor parallelism over memory that the GPUs of a machine reach in each other.

NCCL's sum of the few rows of a decode step is mostly waiting. torch's kernels for symmetric memory
read what the others have, add it up and are done: up to ``_ONE_SHOT`` bytes each rank reads all of
it, up to the buffer's size each adds up its part for all of them. What is larger, or of another
type, stays NCCL's. All of it can be captured in CUDA graphs.

torch calls these parts of it alpha: they are named in this module alone, and
``tests/parity/test_symmetric.py`` compares them with what is called here.
"""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

DEVICES: tuple[str, ...] = ("cuda",)
OPERATIONS = ("one_shot_all_reduce_copy", "two_shot_all_reduce_", "multimem_all_reduce_")

Agree = Callable[[str], str]
"""Called by all ranks with why they cannot go on, or nothing: what the first of them says that
says anything, the same on all."""

# The type that the kernels know and models are served in, 16 bytes of it at a time.
_DTYPE, _UNIT = torch.bfloat16, 8
# Bytes, by what others published of H100s; see docs/gpu-checklist.md.
_ONE_SHOT = 512 << 10
_BUFFER = 16 << 20
# From so many ranks on it pays to have the switch between the GPUs add up.
_SWITCH = 4


class SharedSums:
    """For the ranks of one process group. What it needs is set up by ``shared_sums``."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, places: Sequence[Sequence[int]]
    ) -> None:
        self._group, self._device, self._places = group, device, places
        self.multicast = False
        """Whether the switch between the GPUs adds up."""

    def look(self) -> None:
        """Raise what speaks against it already."""
        if len({machine for machine, _ in self._places}) > 1:
            raise RuntimeError("the ranks are on several hosts")
        for name in OPERATIONS:
            if not hasattr(torch.ops.symm_mem, name):
                raise RuntimeError(f"torch {torch.__version__} has no {name}")
        _check_reach(self._device, [number for _, number in self._places])

    def allocate(self) -> None:
        """Take the buffer, which is no part of what torch's allocator counts."""
        from torch.distributed import _symmetric_memory as memory

        self._buffer = memory.empty(_BUFFER // _DTYPE.itemsize, dtype=_DTYPE, device=self._device)

    def meet(self) -> None:
        """Learn where the others' buffers are."""
        from torch.distributed import _symmetric_memory as memory

        met = memory.rendezvous(self._buffer, self._group.group_name)
        self.multicast = bool(met.multicast_ptr) and len(self._places) >= _SWITCH

    def prove(self) -> None:
        """Raise if a sum is wrong: of the smallest size, or of the largest of each kind."""
        rank, size = self._group.rank(), self._group.size()
        wrong = []
        for count in (_UNIT, _ONE_SHOT // _DTYPE.itemsize, len(self._buffer)):
            # Whole numbers that bfloat16 holds, as their sums.
            base = torch.arange(count, device=self._device) % 3
            expected = (base * size + size * (size - 1) // 2).to(_DTYPE)
            found = self((base + rank).to(_DTYPE))
            if found is None or not torch.equal(found, expected):
                wrong.append(count)  # and on: the others do not know yet
        if wrong:
            raise RuntimeError(f"sums of {wrong} numbers are wrong")

    def __call__(self, x: Tensor) -> Tensor | None:
        """The sum of all ranks' ``x``, which are contiguous and of one shape: the same bits on all
        of them. None if it is not for these kernels: which no rank decides alone.

        What was in ``x`` may be lost.
        """
        count = x.numel()
        if (
            x.dtype != _DTYPE
            or not 0 < count <= len(self._buffer)
            or count % _UNIT
            or x.storage_offset() % _UNIT
        ):
            return None
        ops, name = torch.ops.symm_mem, self._group.group_name
        shared = self._buffer[:count].view(x.shape)
        if x.nbytes <= _ONE_SHOT:
            return ops.one_shot_all_reduce_copy(shared, x, "sum", name)
        shared.copy_(x)
        kernel = ops.multimem_all_reduce_ if self.multicast else ops.two_shot_all_reduce_
        kernel(shared, "sum", name)
        return x.copy_(shared)  # the next sum needs the buffer

    def __str__(self) -> str:
        kind = "multimem" if self.multicast else "two-shot"
        return f"one-shot to {_ONE_SHOT >> 10} KiB, {kind} to {_BUFFER >> 20} MiB, then nccl"


def shared_sums(
    group: dist.ProcessGroup,
    device: torch.device,
    places: Sequence[Sequence[int]],
    agree: Agree,
) -> SharedSums | None:
    """Called by all ranks of ``group`` at once: something on all of them, or None on all.

    ``places`` are the machine and the device's number of each. What fails on one rank is told to
    all before any of them goes on; one that waits for another in ``meet`` must not do so for ever.
    """
    sums = SharedSums(group, device, places)

    def refused(step: Callable[[], None]) -> str:
        reason = ""
        try:
            step()
        except Exception as refusal:  # whatever drivers come up with
            reason = (str(refusal) or repr(refusal)).splitlines()[0]
            logger.debug("no shared sums: %s", reason)  # all hear of one rank alone
        return agree(reason)

    reason = refused(sums.look) or refused(sums.allocate) or refused(sums.meet)
    if not reason:
        sums.multicast = not agree("" if sums.multicast else "no switch")
        reason = refused(sums.prove)
    if group.rank() == 0:
        where = f"nccl ({reason})" if reason else f"symmetric_memory ({sums})"
        logger.info("sums=%s", where)
    return None if reason else sums


def _check_reach(device: torch.device, numbers: Sequence[int]) -> None:
    """Raise RuntimeError unless this device can add up, and reaches the others' memory."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError(f"{torch.cuda.get_device_name(device)} does not add in bfloat16")
    if len(set(numbers)) < len(numbers):
        raise RuntimeError("the ranks do not number their GPUs alike")
    for number in numbers:
        if number != device.index and not torch.cuda.can_device_access_peer(device, number):
            raise RuntimeError(f"GPU {device.index} does not reach the memory of GPU {number}")
