"""Tensor parallelism: several processes ("ranks") compute one model, each with its share of the
heads, of the MLPs and of the vocabulary.

``Group`` is what the layers and the engine know of it: a few collectives, which all ranks call in
the same order. A rank that is alone sends nothing.
"""

import datetime
import ipaddress
import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor

# Ranks wait for each other's loading; that one has died is seen by those who watch its process.
_PATIENCE = datetime.timedelta(hours=4)


class Group:
    """One rank alone, and the contract of several."""

    rank = 0
    size = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors of one shape: the same bits on every rank.

        What was in ``x`` may be lost.
        """
        return x

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """All ranks' tensors of one shape, in their order, one behind the other along ``dim``."""
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """``x`` with the first rank's values in it."""
        return x

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return number

    def leave(self) -> None:
        """End it; the others must do the same."""


class _Joined(Group):
    """Ranks over torch.distributed's process group."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self._device = device

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self._device.type == "cuda" or self.size == 2:
            dist.all_reduce(x)
            return x
        # In the ranks' order: a row's sum depends on no other row and not on how many there are,
        # as it would where pieces of the tensor go around in a ring.
        first, *others = self._all(x)
        total = first.float()
        for other in others:
            total += other
        return total.to(x.dtype)

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._all(x.contiguous()), dim)

    def _all(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x)
        return found

    def broadcast(self, x: Tensor) -> Tensor:
        dist.broadcast(x, 0)
        return x

    def least(self, number: int) -> int:
        found = torch.tensor(number, device=self._device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def leave(self) -> None:
        dist.destroy_process_group()


def join(
    rank: int,
    size: int,
    address: tuple[str, int],
    device: torch.device,
    listener: socket.socket | None = None,
) -> Group:
    """Meet the other ranks of a group at ``address``, where the first one listens: on ``listener``,
    which is taken over, or on a socket of its own. Waits for all of them.

    NCCL connects CUDA devices, gloo everything else. A process is in one group at a time.
    """
    if size == 1:
        return Group()
    host, port = address
    if rank == 0:
        listener = listener or socket.create_server(address)
        port = listener.getsockname()[1]
    if _is_loopback(host):  # or gloo would listen where the machine's name leads
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore(  # type: ignore[attr-defined]  # it is public all the same
        host,
        port,
        size,
        is_master=rank == 0,
        timeout=_PATIENCE,
        wait_for_workers=False,
        master_listen_fd=listener.detach() if listener else None,
    )
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=_PATIENCE,
        device_id=device if cuda else None,
    )
    return _Joined(rank, size, device)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
