"""The application with everything that settings ask for behind it: engine, critic, decoders."""

from fastapi import FastAPI

from engine.client import ProcessEngine
from preprocessing import MediaPipeline
from server.app import create_app
from wire.settings import EngineSettings, Settings


def application(settings: Settings) -> FastAPI:
    """Nothing of it runs before the application's lifespan begins. Raises SettingError."""

    def engine_of(group: EngineSettings, name: str) -> ProcessEngine:
        return ProcessEngine(
            group,
            name=name,
            log_level=settings.server.log_level,
            log_format=settings.server.log_format,
            max_unread=settings.server.max_unread_tokens,
        )

    critic = None
    if settings.critic.critic_model:
        critic = engine_of(settings.critic_engine, "critic")
    media = MediaPipeline(settings.media)
    return create_app(settings, engine_of(settings.engine, "engine"), media, critic=critic)
