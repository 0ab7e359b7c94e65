"""docs/api.md names the versions of clients that the tests have."""

import json
import re

from tests.docs.test_api_documented import rows
from tests.servers import ROOT

CLIENTS = ROOT / "tests" / "clients"


def test_the_versions_of_clients_are_those_that_are_locked() -> None:
    text = (CLIENTS / "requirements.txt").read_text(encoding="utf-8")
    own = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned, main = (dict(re.findall(r"^([\w.-]+)==(\S+)", each, re.M)) for each in (text, own))
    packages = json.loads((CLIENTS / "node" / "package-lock.json").read_text())["packages"]
    installed = {
        name.partition("/")[2]: entry["version"] for name, entry in packages.items() if name
    }
    table = rows("Clients")
    assert len(table) > 10
    for client, version, over, shown in table:
        name = client.split("`")[1]
        locked = installed if "(npm)" in client else main if "(Python)" in client else pinned
        assert locked[name] == version
        for bring in re.findall(r"bring (\d[\d.]*\d)", shown):
            assert pinned[name] == bring
        for other, its in re.findall(r"`([@\w/-]+)` (\d+\.\d+\.\d+)", over + shown):
            assert (installed | pinned)[other] == its
