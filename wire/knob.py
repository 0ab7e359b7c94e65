"""What a setting is made of: see wire.settings."""

import dataclasses
from typing import Any

from wire.errors import Unservable

QUANTIZATIONS = ("none", "fp8", "fp8-all", "int8", "bnb-8bit", "bnb-4bit", "awq")
"""What a model's weights may be turned into, or kept in."""


class SettingError(Unservable, ValueError):
    """A setting has an unknown name, or a value that is not allowed or does not fit the machine or
    the model."""


def knob(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field that is a setting; ``low`` and ``high`` are inclusive bounds."""
    return dataclasses.field(
        default=default,
        metadata={"help": help, "choices": choices, "low": low, "high": high, "secret": secret},
    )
