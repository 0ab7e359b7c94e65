"""The blocks of shell and Python that a page shows, and what is said of each in a comment before
it, which readers do not see:

``<!-- prints: TEXT -->``       what must stand in what it prints
``<!-- serves -->``             it starts a server, which is asked and ended
``<!-- not run: REASON -->``    it cannot be run by a test
"""

import dataclasses
import re
from pathlib import Path

from tests.servers import ROOT

_BLOCK = re.compile(
    r"(?:^<!-- (?P<said>[\w ]+)(?:: (?P<text>[^\n]*))? -->\n\n)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
RUN = ("bash", "python")
# Other languages show files and what is printed.
SHOWN = ("json", "toml", "yaml", "text")


@dataclasses.dataclass(frozen=True)
class Block:
    """``said`` is "prints", "serves" or "not run", and ``text`` what follows the colon."""

    page: str
    number: int
    language: str
    code: str
    said: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}-{self.text or self.code.splitlines()[0]}"


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, those that only show something included."""
    name = str(page.relative_to(ROOT))
    return [
        Block(name, number, m["language"], m["code"], m["said"] or "", m["text"] or "")
        for number, m in enumerate(_BLOCK.finditer(page.read_text(encoding="utf-8")), 1)
    ]
