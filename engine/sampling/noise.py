"""The randomness of a draw: one exponential number per token, fixed by seed, position and token.

Of all tokens the one with the least ``E / p`` is drawn, E being its exponential number and p its
probability; each token wins with probability p ("exponential race", the Gumbel-max trick in
another form). Its merit here: a rounding error in the logits, which depend a little on what else
is in the batch, can only change a draw where two tokens nearly tie for the first place. Looking up
one number among the cumulated probabilities would be touched by it at the border of every token.
"""

import hashlib
import struct

import torch
from torch import Tensor

_SIGN = 1 << 31
# An exponential number must be finite; in fp32 the next one below 1.
_BELOW_ONE = 1 - 2.0**-24


def key(seed: int, position: int) -> tuple[int, int]:
    """Two numbers of 32 bits, signed, that stand for a draw."""
    data = struct.pack("<qQ", seed, position)
    digest = hashlib.blake2b(data, digest_size=8, person=b"internvl-draw").digest()
    return struct.unpack("<ii", digest)


def exponentials(keys: Tensor, count: int) -> Tensor:
    """int32 keys ``[R, 2]`` to numbers of the standard exponential distribution, fp32 ``[R, V]``.

    The bits are a hash of token and key, in integers that wrap, so every device finds the same.
    """
    tokens = torch.arange(count, dtype=torch.int32, device=keys.device)
    bits = _mix(tokens * _signed(0x9E3779B9) ^ keys[:, :1])
    bits = _mix(bits ^ keys[:, 1:])
    uniform = (bits.bitwise_and_(_SIGN - 1).float() + 0.5).mul_(1 / _SIGN).clamp_(max=_BELOW_ONE)
    return uniform.neg_().log1p_().neg_()


def _mix(x: Tensor) -> Tensor:
    """Chris Wellons' "lowbias32", a bijection of 32 bits in which every bit depends on every other;
    https://github.com/skeeto/hash-prospector. Overwrites its argument."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= _SIGN else number
