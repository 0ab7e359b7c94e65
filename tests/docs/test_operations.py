"""What docs/operations.md and docs/observability.md tell operators to set exists."""

import re

from server.metric_table import TABLE
from tests.servers import ROOT
from wire.settings import each_setting

PAGE = "".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("operations.md", "observability.md")
)
PARTS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
# Values of labels: codes of errors, and why workers were ended.
CODES = {value for row in TABLE.values() for value in row.values}


def test_every_setting_that_helps_exists() -> None:
    known = {field.name for _, field, *_ in each_setting()}
    for part in ("Sizing", "Scaling", "Upgrades", "Drain", "Alerts"):
        text = re.sub("```.*?```", "", PARTS[part], flags=re.DOTALL)
        named = set(re.findall(r"`((?!internvl_)[a-z0-9]+(?:_[a-z0-9]+)+)`", text))
        assert named - CODES <= known, part
