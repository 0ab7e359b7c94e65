"""The folders of checkpoints that settings name; the embedded demo model where they name none."""

import dataclasses
import importlib.util
from pathlib import Path

from server import hub
from wire.settings import SettingError, Settings

DEMO_NAME = "internvl-demo"


def with_model(settings: Settings, *, weights: bool = True) -> Settings:
    """Settings that name a folder: the demo checkpoint where none was given, and one of the cache
    for a model of a hub, of which ``weights`` may be left out. Raises SettingError if there is no
    such folder."""
    folder = settings.engine.model
    name = settings.server.served_model_name
    if not folder:
        folder, name = str(_demo_checkpoint()), name or DEMO_NAME
    elif hub.is_name(folder):
        name = name or folder
        folder = str(hub.fetch(folder, settings.engine.revision, weights=weights))
    path = _checkpoint(folder, "--model")
    return dataclasses.replace(
        settings,
        engine=dataclasses.replace(settings.engine, model=str(path)),
        server=dataclasses.replace(settings.server, served_model_name=name or path.name),
    )


def with_critic(settings: Settings) -> Settings:
    """The same for the critic's folder, if there is to be one."""
    critic = settings.critic
    folder = critic.critic_model
    if not folder:
        return settings
    if hub.is_name(folder):
        folder = str(hub.fetch(folder, critic.critic_revision))
    path = _checkpoint(folder, "--critic-model")
    critic = dataclasses.replace(critic, critic_model=str(path))
    return dataclasses.replace(settings, critic=critic)


def _checkpoint(folder: str, flag: str) -> Path:
    """The folder that was named. Raises SettingError where there is none."""
    try:
        path = Path(folder).expanduser().resolve()
        found = (path / "config.json").is_file()
    except (OSError, RuntimeError) as error:  # of a home or a link that leads nowhere
        raise SettingError(f"{flag}: {folder} cannot be read: {error}") from None
    if not found:
        raise SettingError(f"{flag}: {folder} is not a checkpoint folder (no config.json in it)")
    return path


def _demo_checkpoint() -> Path:
    # By path: the demo package stands above this one and must not be imported from here.
    spec = importlib.util.find_spec("demo")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place, "checkpoint", "hf")
        if folder.is_dir():
            return folder
    raise SettingError("the demo checkpoint is not installed; name a checkpoint with --model")
