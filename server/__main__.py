"""``python -m server``: the same as ``internvl serve``; the other commands work too."""

import sys

from server.cli import main

given = sys.argv[1:]
if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
    given = ["serve", *given]
sys.exit(main(given))
