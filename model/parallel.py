"""Several processes ("ranks") compute one model. With tensor parallelism each has its share of the
heads, of the MLPs and of the vocabulary; with pipeline parallelism, its share of the layers.

``Group`` is what the layers and the engine know of it: a few collectives, which all ranks call in
the same order. A rank that is alone sends nothing.

Of the layers that a stage has (``model.stages``), rows of a matrix are shared out among its ranks
where its results are a rank's own (queries, keys and values, gates and what they gate), columns
where a sum over the ranks follows (``attention.out``, ``down``), rows of the vocabulary with the
embedding and the head. Norms, routers, encoder and projector are whole on every rank.
"""

import dataclasses
import datetime
import hashlib
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model import symmetric
from model.backbones.backbone import Rows, parts
from model.schema import TextConfig
from wire.knob import SettingError

# Rows of the vocabulary on a rank are a multiple of this: products like round numbers.
_VOCABULARY_STEP = 64
# Ranks wait for each other's loading; that one has died is seen by those who watch its process.
_PATIENCE = datetime.timedelta(hours=4)
# In which ranks that are all there have met to share memory, or do not.
_MEETING = datetime.timedelta(minutes=1)
# Bytes of what a rank says against it.
_WORDS = 200


class Group:
    """One rank alone, and the contract of several: ``size`` in each of ``stages``."""

    rank = 0
    """In its stage."""
    size = 1
    stage = 0
    stages = 1
    neighbours = 1
    """Ranks on this machine, this one included: they share its memory and its cores."""
    device: torch.device | None = None
    """What the ranks met to compute on; None leaves the choice."""

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.size == self.stages == 1

    @property
    def is_first(self) -> bool:
        """Of all ranks."""
        return self.stage == self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a stage's tensors of one shape: the same bits on all of its ranks.

        What was in ``x`` may be lost.
        """
        return x

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """A stage's tensors of one shape, in its ranks' order, one behind the other along
        ``dim``."""
        return x

    def send(self, x: Tensor) -> None:
        """To the rank of the same number in the stage behind; from the last stage, in the first."""

    def receive(self, like: Tensor) -> Tensor:
        """What the stage before has sent, of the shape and type of ``like``."""
        return like

    def broadcast(self, x: Tensor) -> Tensor:
        """``x`` with the values of the first of all ranks in it."""
        return x

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        return number

    def leave(self) -> None:
        """End it; the others must do the same."""


class _Joined(Group):
    """Ranks over torch.distributed's process group."""

    _shared: symmetric.SharedSums | None = None

    def __init__(self, rank: int, size: int, stages: int, device: torch.device) -> None:
        self.size, self.stages = size // stages, stages
        self.stage, self.rank = divmod(rank, self.size)
        self.device = device
        step = self.size
        self._before, self._behind = (rank - step) % size, (rank + step) % size
        self._peers: dist.ProcessGroup | None = None  # in this stage; None: all ranks are
        if self.size > 1 and stages > 1:
            # All ranks make all of them.
            made = [
                dist.new_group(list(range(first, first + step)), timeout=_PATIENCE)
                for first in range(0, size, step)
            ]
            self._peers = made[self.stage]
        place = torch.tensor([_machine(), device.index or 0], device=device)
        found = [torch.empty_like(place) for _ in range(size)]
        dist.all_gather(found, place)
        places = torch.stack(found).tolist()
        self.neighbours = [machine for machine, _ in places].count(places[rank][0])
        self._places = places[self.stage * step :][:step]

    def share_memory(self, store: dist.Store) -> None:  # type: ignore[name-defined]  # it is public
        """Have small sums do without NCCL, if all ranks of the stage can. All must call it."""
        group = self._peers or dist.group.WORLD
        assert group is not None and self.device is not None  # noqa: S101, PT018 - for mypy
        # Who waits for one that has failed gives up before all others do.
        store.set_timeout(_MEETING)
        try:
            self._shared = symmetric.shared_sums(
                group, self.device, self._places, self._first_words
            )
        finally:
            store.set_timeout(_PATIENCE)

    def _first_words(self, own: str) -> str:
        """What the first rank of this stage says that says anything."""
        words = own.encode("ascii", "replace")[:_WORDS].ljust(_WORDS)
        mine = torch.tensor(list(words), dtype=torch.uint8, device=self.device)
        said = [bytes(line.tolist()).decode("ascii").strip() for line in self._all(mine)]
        return next((f"rank {rank}: {text}" for rank, text in enumerate(said) if text), "")

    def sum(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        x = x.contiguous()
        if self._shared is not None and (total := self._shared(x)) is not None:
            return total
        if x.is_cuda or self.size == 2:
            dist.all_reduce(x, group=self._peers)
            return x
        # In the ranks' order: a row's sum depends on no other row and not on how many there are,
        # as it would where pieces of the tensor go around in a ring.
        first, *others = self._all(x)
        total = first.float()
        for other in others:
            total += other
        return total.to(x.dtype)

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return torch.cat(self._all(x.contiguous()), dim) if self.size > 1 else x

    def _all(self, x: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x, group=self._peers)
        return found

    def send(self, x: Tensor) -> None:
        dist.send(x.contiguous(), self._behind)

    def receive(self, like: Tensor) -> Tensor:
        found = torch.empty_like(like)
        dist.recv(found, self._before)
        return found

    def broadcast(self, x: Tensor) -> Tensor:
        dist.broadcast(x, 0)
        return x

    def least(self, number: int) -> int:
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def leave(self) -> None:
        self._shared = None
        dist.destroy_process_group()


def join(
    rank: int,
    size: int,
    address: tuple[str, int],
    device: torch.device,
    listener: socket.socket | None = None,
    stages: int = 1,
    *,
    share_memory: bool = True,
) -> Group:
    """Meet the other ranks of a group at ``address``, where the first one listens: on ``listener``,
    which is taken over, or on a socket of its own. Waits for all of them.

    ``rank`` is one of all ``size``, which are counted stage by stage.

    NCCL connects CUDA devices, gloo everything else; with ``share_memory`` small sums do without
    NCCL where they can (``model.symmetric``), which takes its memory here, before any is counted. A
    process is in one group at a time.
    """
    if size == 1:
        return Group()
    host, port = address
    if rank == 0:
        listener = listener or socket.create_server(address)
        port = listener.getsockname()[1]
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
    group = _Joined(rank, size, stages, device)
    if share_memory and group.size > 1 and device.type in symmetric.DEVICES:
        group.share_memory(store)
    return group


def _machine() -> int:
    """A number that is the same for all processes of a machine, also where each has a network of
    its own, and for no others."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    except OSError:
        name = socket.gethostname()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


@dataclasses.dataclass(frozen=True)
class Cut:
    """A rank's part of a parameter: ``ranges`` of its rows (``dim`` 0) or columns (1), one behind
    the other. What these leave of the rank's parameter is zero."""

    dim: int
    ranges: tuple[Rows, ...]


def share(config: TextConfig, size: int) -> TextConfig:
    """The decoder that each of ``size`` ranks computes. Where there are more ranks than key heads,
    several have the same one; the vocabulary is padded.

    Raises ValueError where the heads or the MLPs cannot be divided.
    """
    if size == 1:
        return config
    if not _divides(config, size):
        widths = " and ".join(map(str, _widths(config)))
        raise SettingError(
            f"tensor_parallel_size {size} does not divide the model: it has {config.heads} query "
            f"heads, {config.kv_heads} key heads and MLPs {widths} wide; possible: "
            + ", ".join(map(str, possible_sizes(config)))
        )
    experts = config.experts
    if experts is not None:
        inner = experts.intermediate_size // size
        experts = dataclasses.replace(experts, intermediate_size=inner)
    rows = -(-config.vocab_size // size)
    return dataclasses.replace(
        config,
        heads=config.heads // size,
        kv_heads=max(1, config.kv_heads // size),
        intermediate_size=config.intermediate_size // size,
        vocab_size=-(-rows // _VOCABULARY_STEP) * _VOCABULARY_STEP,
        experts=experts,
    )


def possible_sizes(config: TextConfig) -> list[int]:
    """How many ranks there may be."""
    return [size for size in range(1, config.heads + 1) if _divides(config, size)]


def _divides(config: TextConfig, size: int) -> bool:
    heads, kv_heads = config.heads % size, config.kv_heads
    return not (
        heads or (kv_heads % size and size % kv_heads) or any(w % size for w in _widths(config))
    )


def _widths(config: TextConfig) -> list[int]:
    """Of the MLPs that there are."""
    experts = config.experts
    dense = [config.intermediate_size] if experts is None or experts.dense else []
    return dense + ([experts.intermediate_size] if experts else [])


def cuts(config: TextConfig, rank: int, size: int) -> dict[str, Cut]:
    """What a rank holds of each parameter of ``InternVL`` that it does not hold whole; parameters
    that only other models have are among them."""
    if size == 1:
        return {}
    part, hidden = share(config, size), config.hidden_size
    vocabulary = Cut(0, (_rank_rows(rank, part.vocab_size, config.vocab_size),))
    found = {"decoder.embedding.weight": vocabulary, "decoder.head.weight": vocabulary}
    layer = _attention(config, part, rank, size) | _mlp(
        "mlp.", config.intermediate_size, rank, size
    )
    # Added once.
    layer["attention.out.bias"] = Cut(0, ((0, hidden),) if rank == 0 else ())
    if (experts := config.experts) is not None:
        for index in range(experts.count):
            layer |= _mlp(f"mlp.experts.{index}.", experts.intermediate_size, rank, size)
    for index in range(config.layers):
        found |= {f"decoder.layers.{index}.{name}": cut for name, cut in layer.items()}
    return found


def _attention(config: TextConfig, part: TextConfig, rank: int, size: int) -> dict[str, Cut]:
    _, keys, values = parts(config)
    query = _rank_rows(rank, part.heads * config.head_dim)
    first, count = rank * config.kv_heads // size * config.head_dim, part.kv_heads * config.head_dim
    same = [(start + first, start + first + count) for start, _ in (keys, values)]
    qkv = Cut(0, (query, *same))
    return {
        "attention.qkv.weight": qkv,
        "attention.qkv.bias": qkv,
        "attention.out.weight": Cut(1, (query,)),
    }


def _mlp(prefix: str, width: int, rank: int, size: int) -> dict[str, Cut]:
    start, end = _rank_rows(rank, width // size)
    return {
        f"{prefix}gate_up.weight": Cut(0, ((start, end), (width + start, width + end))),
        f"{prefix}down.weight": Cut(1, ((start, end),)),
    }


def _rank_rows(rank: int, count: int, most: int = sys.maxsize) -> Rows:
    """Of a rank that has ``count``, where there are ``most`` in all."""
    return min(rank * count, most), min((rank + 1) * count, most)
