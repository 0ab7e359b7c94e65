"""Which version of what is installed."""

import importlib.metadata


def installed_version(name: str = "internvl-server") -> str:
    """Of a distribution; "unknown" for one that is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
