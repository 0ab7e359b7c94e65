"""What the commands share that ask a server: its flags, and starting one where none is named."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from server.flags import DOOR, add_config, add_settings, given
from wire.loading import ENV_PREFIX
from wire.logs import say
from wire.settings import SettingError, each_setting

if TYPE_CHECKING:
    from server.target import Target


def add_target(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """The flags that say which server is asked."""
    parser.add_argument(
        "--url",
        metavar="URL",
        help="ask the server there, such as http://127.0.0.1:8000; --model is then the name it "
        "has in the API. Without, a server is started for this command alone, from the settings "
        "below; it ends with the command",
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help="of the server at --url [INTERNVL_API_KEY]"
    )
    add_config(parser)
    add_settings(parser, without=(*DOOR, *without))


@contextlib.contextmanager
def asked(options: argparse.Namespace) -> "Iterator[Target]":
    """The server, when it is ready. Raises SettingError, and server.target.Unreachable."""
    settings = _settings(options)
    if options.url is not None:
        from server.target import Target

        target = Target(_address(options, settings), _key(options))
        target.wait_ready()
        yield target
        return
    if options.api_key is not None:
        raise SettingError("--api-key is for the server at --url")
    # Imported late, all of them: `internvl --help` should not wait for an HTTP client.
    from server.checkpoint import with_critic, with_model
    from server.flags import forget_secrets
    from server.private import private_server
    from server.terminal import plain
    from wire.loading import load

    # What is logged of a good day would stand between questions and answers.
    quiet = {ENV_PREFIX + "LOG_LEVEL": "warning"}
    known = load(settings, quiet | os.environ, options.config)
    forget_secrets()
    known = with_critic(with_model(known))
    if sys.stderr.isatty():
        say(f"starting a server with {plain(known.server.served_model_name)}")
    with private_server(known) as target:
        target.wait_ready()
        yield target


def _settings(options: argparse.Namespace) -> dict[str, str]:
    """The flags of settings that were given."""
    names = {field.name for _, field, _ in each_setting()} - {"api_key"}
    return {name: value for name, value in given(options).items() if name in names}


def _address(options: argparse.Namespace, settings: dict[str, str]) -> str:
    for name in ("config", *settings):
        if name != "model" and getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise SettingError(f"{flag} is a setting of a server, and the one at --url has its own")
    if re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", options.url) is None:
        raise SettingError(f"--url: {options.url!r} is no address such as http://127.0.0.1:8000")
    # As the clients of OpenAI want it, which is what people have at hand.
    return str(options.url).rstrip("/").removesuffix("/v1")


def _key(options: argparse.Namespace) -> str:
    key = options.api_key
    if key is None:
        key = os.environ.get(ENV_PREFIX + "API_KEY", "").split(",")[0].strip()
    if not (key.isascii() and key.isprintable()):
        raise SettingError("--api-key: there are characters in it that no key has")
    return str(key)
