"""docs/cli.md says what the parser takes: every command, and every flag that is no setting."""

import argparse
import re
import shlex

import pytest

from server.cli import make_parser
from server.flags import flag
from tests.servers import ROOT
from wire.settings import each_setting

PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## internvl ([\w-]+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
SETTINGS = {flag(field) for _, field, _ in each_setting()}
(SHARED,) = re.findall(r"^## Which server is asked\n(.*?)^## ", PAGE, re.M | re.S)


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return commands.choices


def test_every_command_has_a_section_and_a_row() -> None:
    assert set(SECTIONS) == set(parsers())
    assert set(re.findall(r"^\| `([\w-]+)` \|", PAGE.split("## ")[0], re.M)) == set(parsers())


@pytest.mark.parametrize("name", sorted(parsers()))
def test_a_section_names_the_flags_that_are_no_settings(name: str) -> None:
    flags = [
        [word for word in a.option_strings if word[1] == "-"] for a in parsers()[name]._actions
    ]
    own = {words[0] for words in flags if words} - SETTINGS - {"--help"}
    text = SECTIONS[name] + (SHARED if "--url" in own else "")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert own - named == set()
    known = {word for words in flags for word in words}
    assert named - known - ({"--api-keys-file"} if name == "key" else set()) == set()


@pytest.mark.parametrize("name", sorted(parsers()))
def test_the_examples_are_taken_by_the_parser(name: str) -> None:
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", SECTIONS[name], re.S)).splitlines()
    assert lines
    for line in lines:
        (words,) = re.findall(r"internvl ([^|>)]*)", line)
        assert make_parser().parse_args(shlex.split(words)).command == name


def test_exit_statuses_are_those_of_the_code() -> None:
    from server import cli
    from server.commands import run_batch

    assert (cli.EXIT_USAGE, cli.EXIT_INTERRUPTED) == (2, 130)
    assert (run_batch.EXIT_FAILED, run_batch.EXIT_UNFINISHED) == (1, 3)
    assert "0 all answered, 1 some failed, 3 some are left" in PAGE
    assert "130 for Ctrl-C" in PAGE
