"""``internvl serve``: a model over HTTP."""

import argparse
import os
from typing import Any

from server.checkpoint import with_critic, with_model
from server.flags import add_config, add_settings, forget_secrets, given
from wire import logs
from wire.loading import load


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP. Without --model, the embedded demo model.",
    )
    add_config(parser)
    add_settings(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until a signal or a failure. Raises SettingError."""
    settings = with_critic(with_model(load(given(options), os.environ, options.config)))
    logs.setup(settings.server.log_level, logs.FRONT, settings.server.log_format)
    forget_secrets()
    # Imported late: `internvl --help` should not wait for a web framework.
    from server.run import serve
    from server.start import application

    return serve(application(settings), settings)
