"""transformers' own InternVL over the same checkpoint folder, as the oracle of the parity tests."""

import math

import torch
from torch import Tensor

from engine import reference

# (255 * mean, 255 * std) of ImageNet, which both implementations normalise with.
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255


class Reference(reference.Reference):
    """The oracle, for tiles as the engine has them: uint8 ``[T, 3, side, side]``."""

    def logits(
        self, ids: list[int], tiles: Tensor | None = None, at: list[int] | None = None
    ) -> Tensor:
        """fp32 logits ``[tokens, vocab]`` of one prompt."""
        return super().logits(ids, _normalised(tiles), at)

    @torch.inference_mode()
    def greedy(
        self,
        ids: list[int],
        tiles: Tensor | None,
        count: int,
        positions: list[float] | None = None,
    ) -> list[int]:
        """``count`` likeliest tokens, with a cache, one after the other. ``positions`` are those of
        the prompt; behind it they are whole numbers further."""
        at = list(range(len(ids))) if positions is None else positions
        out = self.model(
            **self._inputs(ids, _normalised(tiles)) | self._at(at, len(ids)), use_cache=True
        )
        tokens: list[int] = []
        while True:
            tokens.append(int(out.logits[0, -1].argmax()))
            if len(tokens) == count:
                return tokens
            out = self.model(
                input_ids=torch.tensor([tokens[-1:]]),
                past_key_values=out.past_key_values,
                use_cache=True,
                **self._at([math.ceil(at[-1]) + len(tokens)], len(ids) + len(tokens)),
            )

    def _at(self, positions: list[float], length: int) -> dict[str, Tensor]:
        # Without a mask, positions that do not go up by one would mean several sequences in one.
        mask = torch.ones(1, length, dtype=torch.long)
        return {"position_ids": torch.tensor([positions]), "attention_mask": mask}


def _normalised(tiles: Tensor | None) -> Tensor | None:
    return None if tiles is None else (tiles.float() - _MEAN) / _STD
