"""Requests that are wrong in one place: every value of a right one, left out or replaced."""

import copy
from collections.abc import Iterator
from typing import Any

STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**63, 1.5, -1e300, "", "x", "\x00", "x" * 2000),
    *([], [None], ["x"], [[]], {}, {"type": "x"}, {"type": ["x"]}, {"type": None, "role": {}}),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside of a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield (*path, key)
        if isinstance(value[key], dict | list):
            yield from places(value[key], (*path, key))


def mutants(body: Any) -> Iterator[Any]:
    """All of them."""
    for *path, key in places(body):
        for strange in (..., *STRANGE):
            mutant = copy.deepcopy(body)
            inner = mutant
            for step in path:
                inner = inner[step]
            if strange is ...:
                del inner[key]
            else:
                inner[key] = strange
            yield mutant
