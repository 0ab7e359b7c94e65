"""What the front end must know of a model in order to build a prompt for it.

The engine reads these facts from config.json and sends them once, inside ``Ready``; the front
end never opens the model's config itself, so one function decides every number.
"""

import msgspec


class VisionGeometry(msgspec.Struct, frozen=True):
    """How a picture becomes tiles and tiles become prompt tokens.

    ``tile_size`` is the side in pixels (448 for InternVL3), ``tokens_per_tile`` the number of
    context tokens one tile fills (256). ``mean`` and ``std`` are per channel, for pixels scaled
    to 0..1; they are applied on the device, tiles travel as uint8. A picture is cut into up to
    ``max_tiles`` tiles, the thumbnail not counted; a request may ask for up to ``tile_limit``.
    """

    tile_size: int
    tokens_per_tile: int
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    allowed_tiles: int = 0  # 0: max_tiles

    @property
    def tile_limit(self) -> int:
        """Most tiles of one picture that can be asked for, the thumbnail not counted."""
        return self.allowed_tiles or self.max_tiles

    def limited(self, most: int) -> "VisionGeometry":
        """The same with ``most`` tiles allowed; 0 leaves it to the model."""
        if not most:
            return self
        return msgspec.structs.replace(
            self,
            allowed_tiles=most,
            max_tiles=min(self.max_tiles, most),
            min_tiles=min(self.min_tiles, most),
        )

    @property
    def tile_bytes(self) -> int:
        """Bytes of one uint8 tile ``[3, tile_size, tile_size]``."""
        return 3 * self.tile_size * self.tile_size


class PromptFormat(msgspec.Struct, frozen=True):
    """Which chat template the checkpoint was trained with.

    ``template`` is "hf" (native checkpoints) or the name of an original checkpoint's: those have a
    default system sentence, and number pictures when there are several. ``system`` is the sentence
    used when the client sends no system message; None means no system turn. ``after_turn`` follows
    the token that ends a turn.
    """

    template: str
    system: str | None
    number_images: bool
    after_turn: str = "\n"
