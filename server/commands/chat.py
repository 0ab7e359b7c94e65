"""``internvl chat``: a conversation in the terminal, or one question from a pipe."""

import argparse
import sys
from typing import Any

from server.commands.asking import add_target, asked
from wire.settings import SettingError

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model in the terminal",
        description="Talk with a model in the terminal, about pictures and videos too. Questions "
        "are typed, or one is read from a pipe. Without --url and --model, the embedded demo "
        "model.",
    )
    parser.add_argument(
        "media",
        nargs="*",
        metavar="PICTURE",
        help="shown with the first question: files or URLs of pictures and videos",
    )
    add_target(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Talk. Raises SettingError, and server.target.Unreachable."""
    import httpx

    from server.shell.attachments import NoAttachment, attachment
    from server.shell.paper import paper
    from server.shell.session import Session
    from server.shell.shell import Shell

    # Read before a model is loaded for it.
    question = None if sys.stdin.isatty() else sys.stdin.buffer.read().decode(errors="replace")
    if question is not None and not question.strip():
        raise SettingError("nothing was asked: standard input is empty")
    try:
        attached = [attachment(name) for name in options.media]
    except NoAttachment as error:
        raise SettingError(str(error)) from None
    with asked(options) as target:
        model = options.model if options.url and options.model else target.model()
        timeout = httpx.Timeout(600.0, connect=10.0)
        with httpx.Client(**target.options, timeout=timeout) as client:
            shell = Shell(Session(client, model), paper(), attached)
            if question is None:
                shell.run()
                return 0
            try:
                return 0 if shell.ask(question.strip()) else EXIT_FAILED
            except KeyboardInterrupt:
                return EXIT_INTERRUPTED
