"""Fills the skeleton from safetensors files, one tensor at a time; a rank reads its part of each.

Names and shapes are compared before anything is copied, and the comparison is strict and of the
whole model: whatever is missing, unexpected or of another shape is listed and nothing is loaded.
Only safetensors is read: other formats can run code.
"""

import collections
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from model.awq import INTEGERS, PARTS, FourBits, Int4Linear, four_bits, joined
from model.backbones.backbone import Rows
from model.names import Names, Slot
from model.parallel import Cut
from model.readahead import read_ahead
from model.schema import AwqConfig, CheckpointError, read_json

Progress = Callable[[int, int], None]
Shape = tuple[int, ...]

_FLOATS = {"F32", "F16", "BF16"}
_LISTED = 8


class WeightFiles:
    """The safetensors files of a folder: ``shapes`` of all tensors, and the tensors themselves.

    Those of a layer in four bits are told of as the weight they stand for, and given together.
    """

    def __init__(self, folder: Path, awq: AwqConfig | None = None) -> None:
        self._awq = awq
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        index: dict[str, Any] | None = None
        if (folder / "model.safetensors.index.json").exists():
            section = read_json(folder / "model.safetensors.index.json")
            index = dict(section.section("weight_map").values)
            names = sorted({str(name) for name in index.values()})
        else:
            names = ["model.safetensors"]
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{folder}: the index names {name!r}, which is elsewhere")
            if not (folder / name).is_file():
                raise CheckpointError(_absent(folder, name))
            self._read_header(folder / name)
        if index is not None:
            lost = [key for key in index if key not in self.shapes]
            if lost:
                raise CheckpointError(f"{folder}: the index lists tensors no file has{_some(lost)}")
        if awq is not None:
            self.shapes = joined(self.shapes, awq)

    def _read_header(self, path: Path) -> None:
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(key)
                packed = self._awq is not None and key.endswith(INTEGERS)
                if part.get_dtype() not in ({"I32"} if packed else _FLOATS):
                    raise CheckpointError(
                        f"{path}: tensor {key} has type {part.get_dtype()}, which config.json does "
                        "not account for"
                    )
                if key in self._files:
                    raise CheckpointError(f"{path}: tensor {key} is in another file too")
                self._files[key] = path
                self.shapes[key] = tuple(part.get_shape())

    def packed(self, slots: Mapping[str, Slot]) -> set[str]:
        """The parameters that are stored in four bits, and in nothing else."""
        packed = {slot.parameter for key, slot in slots.items() if key not in self._files}
        return packed - {slot.parameter for key, slot in slots.items() if key in self._files}

    def each(self, wanted: Iterable[str], *, whole: bool) -> Iterator[tuple[str, Any]]:
        """Yield the wanted tensors, file by file, as something that slices of are tensors; of most
        only what is sliced is read, unless ``whole`` says that all will be. Those in four bits are
        ``FourBits``."""
        keys = set(wanted)
        for path in sorted(set(self._files.values())):
            with _open(path) as file:
                found = [key for key in file.keys() if self._stands_for(key) in keys]  # noqa: SIM118
                with read_ahead(path) if whole and found else contextlib.nullcontext():
                    for key in found:
                        name = self._stands_for(key)
                        if self._awq is None or name == key:
                            yield name, file.get_slice(key)
                        else:
                            layer, _, _ = name.rpartition(".")
                            parts = [self._tensor(f"{layer}.{part}") for part in PARTS]
                            yield name, four_bits(parts)

    def _stands_for(self, key: str) -> str:
        """The tensor that one of the files is, or is the first part of."""
        layer, _, part = key.rpartition(".")
        return f"{layer}.weight" if self._awq is not None and part == PARTS[0] else key

    def _tensor(self, key: str) -> torch.Tensor:
        with _open(self._files[key]) as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _absent(folder: Path, name: str) -> str:
    message = f"{folder / name} does not exist"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        message += "; weights in *.bin or *.pt files are refused because loading them can run code"
    return message


def _some(keys: Iterable[str]) -> str:
    listed = sorted(keys)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return f" ({len(listed)}): " + ", ".join(listed[:_LISTED]) + more


def fill(
    skeleton: nn.Module,
    slots: Mapping[str, Slot],
    files: WeightFiles,
    cuts: Mapping[str, Cut],
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    filled: Callable[[str], None] = lambda name: None,
) -> None:
    """Give every parameter of a meta-device ``skeleton`` its values, from files that ``compare``
    found nothing wrong with. Of parameters in ``cuts`` the skeleton has a part.

    ``progress`` is called with bytes copied and bytes in all, as stored in the model; ``filled``
    with the name of each module whose own parameters all have their values.
    """
    meta = dict(skeleton.named_parameters())
    left = collections.Counter(_module(slot) for slot in slots.values())
    types = _types(skeleton, dtype)
    total = sum(parameter.numel() * types[name].itemsize for name, parameter in meta.items())
    done = 0
    progress(0, total)
    for key, stored in files.each(slots, whole=not cuts):
        slot = slots[key]
        cut = cuts.get(slot.parameter)
        owner, _, leaf = slot.parameter.rpartition(".")
        module = skeleton.get_submodule(owner)
        packed = module if isinstance(module, Int4Linear) and leaf == "weight" else None
        if isinstance(stored, FourBits) and packed is None:
            stored = stored.dequantized()
        for name in (leaf,) if packed is None else packed.TYPES:
            if getattr(module, name).is_meta:
                full = f"{owner}.{name}"
                empty = _empty(meta[full], cut if packed is None else None, device, types[full])
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for source, rows in _copies(slot, files.shapes[key][0], cut):
            part = stored[source]
            for name, tensor in ({leaf: part} if packed is None else packed.packed(part)).items():
                getattr(module, name).data[rows].copy_(tensor)
                done += tensor.numel() * types[f"{owner}.{name}"].itemsize
        left[owner] -= 1
        if not left[owner]:
            filled(owner)
        progress(done, total)
    progress(total, total)  # what pads the vocabulary is in no file


def _types(skeleton: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of the parameters: ``dtype``, but where four bits are kept."""
    found = {name: dtype for name, _ in skeleton.named_parameters()}
    for name, module in skeleton.named_modules():
        if isinstance(module, Int4Linear):
            found |= {f"{name}.{leaf}": kind for leaf, kind in module.TYPES.items()}
    return found


def _module(slot: Slot) -> str:
    return slot.parameter.rpartition(".")[0]


def _empty(
    parameter: nn.Parameter, cut: Cut | None, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    shape = parameter.shape
    full = cut is None or sum(end - start for start, end in cut.ranges) == shape[cut.dim]
    return (torch.empty if full else torch.zeros)(shape, device=device, dtype=dtype)


def _copies(slot: Slot, stored: int, cut: Cut | None) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """What to take of a stored tensor of so many rows, and the rows of the rank's parameter that
    it fills."""
    columns = () if cut is None or cut.dim == 0 else (slice(*cut.ranges[0]),)
    at = slot.rows[0] if slot.rows else 0  # in the whole parameter
    kept: tuple[Rows, ...] = ((0, at + stored),) if cut is None or cut.dim else cut.ranges
    for first, end in slot.pieces or ((0, stored),):
        place = 0  # on this rank
        for low, high in kept:
            start, stop = max(low, at), min(high, at + end - first)
            if start < stop:
                source = slice(first + start - at, first + stop - at)
                yield (source, *columns), slice(place + start - low, place + stop - low)
            place += high - low
        at += end - first


def _expected_shape(slot: Slot, shapes: Mapping[str, Shape]) -> Shape:
    shape = shapes[slot.parameter]
    return shape if slot.rows is None else (slot.rows[1] - slot.rows[0], *shape[1:])


def compare(whole: nn.Module, names: Names, files: WeightFiles) -> None:
    """Raise CheckpointError where the files do not hold what a skeleton of the whole model has."""
    shapes = {name: tuple(value.shape) for name, value in whole.named_parameters()}
    missing = [key for key in names.slots if key not in files.shapes]
    unexpected = [
        key for key in files.shapes if key not in names.slots and key not in names.ignored
    ]
    wrong = []
    for key, slot in names.slots.items():
        shape = _expected_shape(slot, shapes)
        if key in files.shapes and files.shapes[key] != shape:
            wrong.append(f"{key} is {list(files.shapes[key])} instead of {list(shape)}")
    problems = [
        f"{title}{_some(keys)}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong))
        if keys
    ]
    if problems:
        raise CheckpointError("the weights do not fit config.json: " + "; ".join(problems))
    covered: dict[str, int] = {}
    for slot in names.slots.values():
        size = math.prod(_expected_shape(slot, shapes))
        covered[slot.parameter] = covered.get(slot.parameter, 0) + size
    if covered != {name: math.prod(shape) for name, shape in shapes.items()}:
        raise AssertionError("the name table does not cover the model: this is a bug")
