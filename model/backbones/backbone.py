"""What a backbone file provides: how to read its config and how its tensors are called."""

import dataclasses
from collections.abc import Callable

from model.schema import Section, TextConfig

Rows = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a stored tensor goes: a parameter, or ``rows`` start to end of one.

    ``pieces`` are rows of the stored tensor in the order that the parameter wants them in; none:
    as they are.
    """

    parameter: str
    rows: Rows | None = None
    pieces: tuple[Rows, ...] = ()


Tensors = dict[str, Slot]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One language-model architecture.

    ``model_type`` is its name where a config has no architectures entry. ``tensors`` maps each
    key, below the prefix of the body, to its place in ``Decoder``. ``embedding`` and ``head`` are
    keys below the prefixes of body and head; ``ignored`` lists keys that may be stored but are not
    needed.
    """

    model_type: str
    embedding: str
    head: str
    text_config: Callable[[Section, bool], TextConfig]
    tensors: Callable[[TextConfig], Tensors]
    ignored: Callable[[TextConfig], set[str]]


def parts(config: TextConfig) -> tuple[Rows, Rows, Rows]:
    """The rows of queries, keys and values in ``attention.qkv``."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return (0, query), (query, query + key), (query + key, query + 2 * key)


def below(prefix: str, table: Tensors, *, parameter: str | None = None) -> Tensors:
    """A table with ``prefix`` before every key, and before every parameter unless another one is
    given for those."""
    before = prefix if parameter is None else parameter
    return {
        prefix + key: dataclasses.replace(slot, parameter=before + slot.parameter)
        for key, slot in table.items()
    }


def in_layers(config: TextConfig, layer: Tensors) -> Tensors:
    """What stands in every layer, under the whole keys."""
    found: Tensors = {}
    for index in range(config.layers):
        found |= below(f"layers.{index}.", layer)
    return found


def rotary_buffers(config: TextConfig) -> set[str]:
    """Tables that old versions of transformers stored."""
    per_layer = {f"layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.layers)}
    return per_layer | {"rotary_emb.inv_freq"}


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
