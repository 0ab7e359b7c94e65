"""The ``internvl`` command: its parser, and what all commands do alike. What each does is in
server.commands."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from server.commands import (
    about,
    bench,
    chat,
    completion,
    fetch,
    machine,
    rank,
    run_batch,
    serve,
    verify,
)
from wire.errors import Unservable
from wire.settings import SettingError

EXIT_FAILED, EXIT_USAGE = 1, 2
EXIT_INTERRUPTED = 128 + signal.SIGINT

_ABOUT = """\
An OpenAI-compatible inference server for InternVL3.

  internvl serve                          the embedded demo model on http://127.0.0.1:8000
  internvl serve --model /models/InternVL3-2B --host 0.0.0.0 --port 9000
  INTERNVL_API_KEY=secret internvl serve  clients must send this key
  internvl serve --config server.toml     the same settings from a file
  internvl chat cat.png                   talk with it in the terminal
  echo "What is this?" | internvl chat cat.png
  internvl run-batch -i in.jsonl -o out.jsonl    answer a file of requests
  internvl bench --concurrency 16         what its clients see under a load
  internvl key alice >> keys.toml         make a key for --api-keys-file
  internvl fetch OpenGVLab/InternVL3-2B --to models/2B     get a checkpoint
  internvl doctor                         what this machine has to serve with
  internvl plan /models/InternVL3-8B --gpu-memory 24GiB    whether a model fits
  internvl rank --leader 10.0.0.1         a further host of one model (--nodes)
  internvl verify /models/InternVL3-2B    compare its answers with transformers'

Every setting can be given as a flag, as an environment variable (INTERNVL_ and its name in
capitals) or in a TOML or YAML file; the flag wins, then the variable. `internvl serve --help`
lists them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        parser.print_help()
        return EXIT_USAGE
    options = parser.parse_args(words)
    try:
        status: int = options.run(options)
    except SettingError as error:
        print(f"internvl {options.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except Unservable as error:
        print(f"internvl {options.command}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return status


def make_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = argparse.ArgumentParser(
        "internvl", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True
    )
    for module in (serve, chat, run_batch, bench, fetch, rank, machine, verify, about):
        module.add(commands)
    completion.add(commands, parser)
    return parser
