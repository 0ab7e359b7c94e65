"""From the picture a client names to the tiles the model sees.

``MediaPipeline`` turns a ``MediaPart`` into ``TiledMedia``, or ``TiledVideo``: fetch, decode in a
sandboxed worker, cut into tiles. The pipeline is loaded on first use, because the worker is a
module of this package too and must not carry a network library into its sandbox.
"""

from typing import TYPE_CHECKING

from preprocessing.media import FrameChoice, Loaded, MediaPart, Spent, TiledMedia, TiledVideo

if TYPE_CHECKING:
    from preprocessing.pipeline import MediaPipeline

__all__ = [
    "FrameChoice",
    "Loaded",
    "MediaPart",
    "MediaPipeline",
    "Spent",
    "TiledMedia",
    "TiledVideo",
]


def __getattr__(name: str) -> object:
    if name == "MediaPipeline":
        from preprocessing.pipeline import MediaPipeline

        return MediaPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
