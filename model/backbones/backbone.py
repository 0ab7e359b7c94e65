"""What a backbone file provides: how to read its config and how its tensors are called."""

import dataclasses
from collections.abc import Callable

from model.schema import Section, TextConfig

Tensors = dict[str, tuple[str, tuple[int, int] | None]]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One language-model architecture.

    ``model_type`` is its name where a config has no architectures entry. ``tensors`` maps each
    key, below the prefix of the body, to a parameter of ``Decoder`` and, if the parameter holds
    several stored tensors, to the rows it fills. ``embedding`` and ``head`` are keys below the
    prefixes of body and head; ``ignored`` lists keys that may be stored but are not needed.
    """

    model_type: str
    embedding: str
    head: str
    text_config: Callable[[Section, bool], TextConfig]
    tensors: Callable[[TextConfig], Tensors]
    ignored: Callable[[TextConfig], set[str]]


def rope_theta(section: Section) -> float:
    """The RoPE base, from either spelling; refuses scalings that change positions in range.

    "dynamic" scaling has no effect up to max_position_embeddings, which caps the context.
    """
    theta = section
    for key in ("rope_parameters", "rope_scaling"):
        if not section.has(key):
            continue
        rope = section.section(key)
        kind_key = "rope_type" if rope.has("rope_type") else "type"
        rope.choice(kind_key, "default", ("default", "dynamic"))
        if rope.has("partial_rotary_factor") and rope.number("partial_rotary_factor") != 1:
            raise rope.error("partial_rotary_factor", "other than 1 is not supported")
        if rope.has("rope_theta"):
            theta = rope
    return theta.number("rope_theta", 10000.0)
