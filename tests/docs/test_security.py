"""What docs/security.md says of settings and defaults is so."""

import re

from tests.servers import ROOT
from wire.settings import Settings, each_setting

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
DEFAULTS = PAGE.split("## Defaults", 1)[1].split("##", 1)[0]


def test_every_setting_that_is_named_exists() -> None:
    known = {field.name for _, field, *_ in each_setting()}
    lifting = [line.split(" | ")[1] for line in DEFAULTS.splitlines() if line.startswith("| ")]
    named = set(re.findall(r"`([a-z_]+)(?: = \S+)?`", "".join(lifting)))
    assert len(named) > 10
    assert named - {"cache_salt"} <= known  # which is a field of a request
    assert set(re.findall(r"`([a-z]+_(?:media|timeout|pixels|file|sandbox))`", PAGE)) <= known


def test_the_defaults_are_those_of_the_settings() -> None:
    server, media = Settings().server, Settings().media
    assert server.host == "127.0.0.1"
    closed = (server.api_key, server.admin_port, server.open_metrics, server.cors_origins)
    assert not any(closed)
    assert server.cache_per_key
    assert not any((media.allow_private_media, media.allowed_local_media_path, media.media_proxy))
    assert list(media.allowed_media_ports) == ["80", "443"]
