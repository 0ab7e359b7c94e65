"""Weights of the decoder's layers in eight or four bits by bitsandbytes, as the model cards load
them: LLM.int8 with what is larger than 6 kept apart in 16 bits, or FP4 in blocks of 64.

Encoder, projector, embedding and head stay as they are. In eight bits what is kept apart is chosen
for all tokens of a step at once, so the last bits of an answer may depend on those beside it.
"""

import importlib
from typing import Any

from torch import Tensor, nn

from model.layers import Linear
from model.schema import CheckpointError

# The defaults of transformers' BitsAndBytesConfig.
_THRESHOLD = 6.0
_FOUR_BITS = "fp4"


class BnbLinear(Linear):
    """In the place of a linear layer, with its values; ``inner`` is bitsandbytes' own."""

    def __init__(self, layer: Linear, kind: str, library: Any) -> None:
        nn.Module.__init__(self)
        weight, bias = layer.weight, layer.bias
        shape: dict[str, Any] = {
            "input_features": weight.shape[1],
            "output_features": weight.shape[0],
            "bias": bias is not None,
            "device": "meta",
        }
        if kind == "bnb-8bit":
            inner = library.Linear8bitLt(**shape, has_fp16_weights=False, threshold=_THRESHOLD)
            inner.weight = library.Int8Params(
                weight.data, requires_grad=False, has_fp16_weights=False
            )
        else:
            inner = library.Linear4bit(
                **shape,
                compute_dtype=weight.dtype,
                compress_statistics=False,
                quant_type=_FOUR_BITS,
            )
            inner.weight = library.Params4bit(
                weight.data,
                requires_grad=False,
                compress_statistics=False,
                quant_type=_FOUR_BITS,
                module=inner,
            )
        inner.bias = bias
        self.inner = inner.to(weight.device)  # which quantises

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """What is stored: int8, or two numbers to a byte."""
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


def library() -> Any:
    """bitsandbytes' layers. Raises CheckpointError where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes.nn")
    except ImportError:
        raise CheckpointError(
            "quantization by bitsandbytes needs that library: pip install bitsandbytes"
        ) from None
