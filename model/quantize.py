"""Linear layers in eight bits: weights quantised once, when loaded, and activations as they come,
with a scale for each row of the weight and for each token.

In "fp8" both are float8 (e4m3), and products add in fp32; in "int8" whole numbers, and products are
exact. Only the decoder's layers are quantised, in "fp8-all" those of encoder and projector too;
embedding and head stay as they are. (Where the CPU's own operations compute "int8", they do so for
all layers: model.ops.native.)
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from model import bnb
from model import triton as kernels
from model.awq import Int4Linear
from model.layers import LEAST, Activations, Linear, Rounded, Router
from model.schema import CheckpointError

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_LARGEST_WHOLE = 127
# Multiples that the kernels want of rows and columns of a weight.
_STEP = 16
# Fewer tokens than these torch's product of whole numbers does not take on CUDA.
_ROWS = 32
# Rows of the weight that a product is tried with.
_TRIED = 512
# Of the products' deviation; what rounding to bfloat16 takes is a tenth of it.
_NEAR = 0.03

Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Tokens ``[N, inputs]`` and weights ``[outputs, inputs]`` in float8, their scales ``[N, 1]`` and
``[1, outputs]`` fp32, and a bias in bfloat16: ``[N, outputs]`` bfloat16."""

Quantizer = Callable[[Linear], Linear]
"""A layer with its weights to one that takes its place."""


def to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, size]`` as float8 and a scale per row, ``[N, 1]`` fp32: their product is nearest."""
    if kernels.missing(rows.device) is None:
        # Triton takes a while to import, and is not there on every machine.
        from model.triton import quantize

        return quantize.to_fp8(rows)
    wide = rows.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST) / _LARGEST
    return (wide / scale).clamp(-_LARGEST, _LARGEST).to(_FP8), scale


def _public(
    x: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    by_row = functional.ScalingType.RowWise
    return functional.scaled_mm(
        x, weight.T, x_scale, by_row, scale, by_row,
        bias=bias, output_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def _private(
    x: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    return torch._scaled_mm(
        x, weight.T, x_scale, scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


PRODUCTS: tuple[Product, ...] = (_public, _private)
"""torch's, best first; the second is not public, but older and on every version."""


class Fp8Linear(Linear):
    """In the place of a linear layer, with its values."""

    def __init__(self, layer: Linear, product: Product) -> None:
        nn.Module.__init__(self)
        weight, scale = to_fp8(layer.weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale.T.contiguous(), requires_grad=False)
        self.bias = layer.bias
        self._product = product

    def forward(self, x: Activations) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Activations, bias: Tensor | None) -> Tensor:
        """The product with another bias, ``[..., inputs] -> [..., outputs]``."""
        if isinstance(x, Tensor):
            x = Rounded(*to_fp8(x.flatten(0, -2)), x.shape[:-1], x.dtype)
        bias = None if bias is None else bias.bfloat16()
        found = self._product(x.rows, self.weight, x.scale, self.scale, bias)
        return found.to(x.dtype).view(*x.lead, -1)


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, size]`` as int8 and a scale per row, ``[N, 1]`` fp32: their product is nearest."""
    wide = rows.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST) / _LARGEST_WHOLE
    return (wide / scale).round().to(torch.int8), scale


class Int8Linear(Linear):
    """In the place of a linear layer, with its values."""

    def __init__(self, layer: Linear) -> None:
        nn.Module.__init__(self)
        weight, scale = to_int8(layer.weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale.T.contiguous(), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = to_int8(x.flatten(0, -2))
        count = len(rows)
        if count < _ROWS:
            rows = functional.pad(rows, (0, 0, 0, _ROWS - count))
        found = torch._int_mm(rows, self.weight.T)[:count] * scale * self.scale
        if self.bias is not None:
            found += self.bias
        return found.to(x.dtype).view(*x.shape[:-1], -1)


def quantizer(
    decoder_layers: nn.ModuleList,
    kind: str,
    device: torch.device,
    others: Sequence[nn.Module] = (),
) -> Quantizer | None:
    """What takes the place of the linear layers of the decoder's layers and of ``others``, made
    when they have their weights: in float8 for "fp8" and "fp8-all", in whole numbers for "int8", or
    by bitsandbytes (``model.bnb``). None for "none".

    Raises CheckpointError where the device, the model's shape or what is installed does not allow
    it.
    """
    for part in others:
        _check_sizes(part, kind)
    if kind.startswith("fp8"):
        return functools.partial(Fp8Linear, product=_product(decoder_layers, kind, device))
    if kind == "int8":
        _check_sizes(decoder_layers, kind)
        return Int8Linear
    if kind.startswith("bnb"):
        return functools.partial(bnb.BnbLinear, kind=kind, library=bnb.library())
    return None


def quantize_layer(decoder: nn.Module, name: str, quantized: Quantizer) -> None:
    """Replace the layer of this name, if it is one that is quantised. One by one, so that memory
    never holds all layers as they were stored."""
    layer = decoder.get_submodule(name)
    if name.startswith("layers.") and isinstance(layer, Linear) and not isinstance(layer, Router):
        decoder.set_submodule(name, quantized(layer))


def quantize_whole(part: nn.Module, quantized: Quantizer) -> None:
    """Replace all linear layers of a part of the model that was loaded, one by one."""
    for name in [name for name, layer in part.named_modules() if isinstance(layer, Linear)]:
        part.set_submodule(name, quantized(part.get_submodule(name)))  # type: ignore[arg-type]


def weight_bytes(layer: nn.Module, itemsize: int, kind: str) -> int:
    """What a part of the model takes whose layers are quantised; numbers that are not, and all of
    them for "none", take ``itemsize`` bytes."""
    # Four bits come with an fp32 scale that 64 of them share. Layers that AWQ stored already are
    # what they will be.
    bits = {"none": 8 * itemsize, "awq": 8 * itemsize, "bnb-4bit": 4.5}.get(kind, 8)
    held = {
        id(getattr(module, name)): dtype.itemsize
        for module in layer.modules()
        if isinstance(module, Int4Linear)
        for name, dtype in module.TYPES.items()
    }
    return sum(
        int(p.numel() * held.get(id(p), bits / 8 if p.dim() > 1 else itemsize))
        for p in layer.parameters()
    )


def _check_sizes(part: nn.Module, kind: str) -> torch.Size:
    """The size of one of its linear layers; raises CheckpointError where one does not suit the
    kernels."""
    sizes = [
        child.weight.shape
        for child in part.modules()
        if isinstance(child, Linear) and not isinstance(child, Router)
    ]
    if any(length % _STEP for size in sizes for length in size):
        raise CheckpointError(
            f"{kind} wants a model whose sizes are multiples of {_STEP}, on each rank"
        )
    return sizes[0]


def _product(decoder_layers: nn.ModuleList, kind: str, device: torch.device) -> Product:
    """The first product that computes what it should for a layer as wide as one of these."""
    outputs, inputs = _check_sizes(decoder_layers, kind)
    outputs = min(outputs, _TRIED)
    weight = torch.arange(outputs * inputs, device=device).sin().view(outputs, inputs)
    x = torch.linspace(-1, 1, 3 * inputs, device=device).cos().view(3, -1)
    (rows, x_scale), (held, scale) = to_fp8(x), to_fp8(weight)
    expected = (rows.double() * x_scale) @ (held.double() * scale).T
    bias = torch.zeros(len(weight), dtype=torch.bfloat16, device=device)
    reasons = []
    for product in PRODUCTS:
        try:
            found = product(rows, held, x_scale, scale.T.contiguous(), bias)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:
            # A sentence: torch goes on with all that the operation was registered for.
            reasons.append(f"{type(error).__name__}: {error}".split(". ")[0].splitlines()[0])
            continue
        wrong = float((found.double() - expected).abs().max() / expected.std())
        if wrong < _NEAR:
            return product
        reasons.append(f"it is wrong by {wrong:.2g} of what it computes")
    raise CheckpointError("fp8 products cannot be computed here: " + "; ".join(reasons))
