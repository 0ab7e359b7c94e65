"""A file of settings: TOML, or YAML where its name ends so."""

import tomllib
from pathlib import Path
from typing import Any

from wire.knob import SettingError

MOST = 1 << 20
_YAML = (".yaml", ".yml")
_TAG = "tag:yaml.org,2002:"
_PLAIN = tuple(_TAG + name for name in ("str", "int", "float", "bool", "timestamp"))


def read_settings(file: Path) -> dict[str, Any]:
    """What it says, by names that may not be those of settings. Raises SettingError."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST + 1)
        if len(data) > MOST:
            raise SettingError(f"the settings file {file} has more than {MOST >> 20} MiB")
        text = data.decode()
        return _yaml(text) if file.suffix.lower() in _YAML else tomllib.loads(text)
    except OSError as error:
        reason = error.strerror or type(error).__name__
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # of TOML, or one of ours
        if isinstance(error, SettingError):
            raise
        reason = str(error)
    raise SettingError(f"the settings file {file} cannot be read: {reason}")


def _yaml(text: str) -> dict[str, Any]:
    """Names and values as they are written, each a text or a list of texts, which are then read as
    those of the environment are: a key such as 0123 stays what it is, where YAML would make 83 of
    it. No object is built, and no alias followed."""
    # Imported late: few have such a file.
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        # Not the whole error: it holds a piece of the file, and there may be a secret in it.
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except yaml.YAMLError:
        raise ValueError("there are characters in it that YAML does not allow") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("it is no list of names and values")
    found: dict[str, Any] = {}
    for key, value in root.value:
        where = f"line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{where} begins with something else than a name")
        if key.value in found:
            raise ValueError(f"{where} gives {key.value!r} a second time")
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for item in items:
            if not isinstance(item, yaml.ScalarNode) or item.tag not in _PLAIN:
                raise ValueError(f"{key.value!r} in {where} needs a value, or a list of values")
        texts = [item.value for item in items]
        found[key.value] = texts if isinstance(value, yaml.SequenceNode) else texts[0]
    return found
