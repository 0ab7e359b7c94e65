"""What docs/operations.md tells operators to look at and to set exists."""

import re

from tests.servers import ROOT
from wire.settings import each_setting

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def test_every_metric_exists() -> None:
    known = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.M))
    named = set(re.findall(r"`(internvl_\w+)(?!\w*\*)", PAGE))
    assert len(named) > 30
    assert named <= known


def test_every_setting_that_helps_exists() -> None:
    known = {field.name for _, field, *_ in each_setting()}
    for part in ("Sizing", "Scaling", "Upgrades", "Drain", "Alerts"):
        text = re.sub("```.*?```", "", PARTS[part], flags=re.DOTALL)
        named = set(re.findall(r"`((?!internvl_)[a-z0-9]+(?:_[a-z0-9]+)+)`", text))
        # Codes of errors.
        assert named - {"too_many_pictures", "media_unreachable", "media_forbidden"} <= known, part
