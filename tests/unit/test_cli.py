"""The command line: generated from the settings, friendly, and without a web framework until it
is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI

from server.announce import announce, example
from server.app import create_app
from server.checkpoint import with_model
from server.cli import main
from server.flags import flag, settings_page
from tests import small_tokenizer
from tests.fake_engine import FakeEngine, FakeMedia
from wire.settings import (
    EngineSettings,
    ServerSettings,
    SettingError,
    Settings,
    each_setting,
)

ROOT = Path(__file__).parents[2]


def run(*words: str, module: str = "server", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_help_names_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for _, field, _ in each_setting():
        assert flag(field) in text
    assert "[8000]" in text
    assert "{auto,cpu,cuda}" in text


def test_the_general_help_shows_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for word in ("internvl serve --model", "--config", "INTERNVL_", "version", "settings"):
        assert word in text
    assert main([]) == 2


def test_an_unknown_command_or_flag_says_what_there_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, says in ((["server"], "serve"), (["serve", "--prot", "1"], "--prot")):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["--port", "high"], {}, "--port"),
        ([], {"INTERNVL_PORT": "70000"}, "INTERNVL_PORT"),
        (["--model", "/nowhere/at/all"], {}, "no config.json"),
        (["serve", "--config", "missing.toml"], {}, "settings file"),
    ],
)
def test_a_wrong_setting_ends_with_one_line(
    words: list[str], env: dict[str, str], says: str
) -> None:
    done = run(*words, **env)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_version_is_printed_by_both_spellings() -> None:
    done = run("version")
    assert done.returncode == 0
    assert done.stdout.strip()


def test_the_settings_page_is_current() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "write it again: internvl settings > docs/settings.md"


def test_a_checkpoint_is_named_after_its_folder_unless_told_otherwise(tmp_path: Path) -> None:
    folder = small_tokenizer.save(tmp_path / "InternVL3-2B")
    engine = EngineSettings(model=str(folder) + "/")
    assert with_model(Settings(engine=engine)).server.served_model_name == "InternVL3-2B"
    named = Settings(ServerSettings(served_model_name="mine"), engine=engine)
    assert with_model(named).server.served_model_name == "mine"
    with pytest.raises(SettingError, match=r"config\.json"):
        with_model(Settings(engine=EngineSettings(model=str(tmp_path))))


async def test_the_console_tells_how_to_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_tokenizer.save(tmp_path / "tiny")
    settings = Settings(
        ServerSettings(api_key=("secret",)), engine=EngineSettings(model=str(folder))
    )
    service = create_app(settings, FakeEngine(), FakeMedia()).state.service
    await service.start()
    await announce(service, "0.0.0.0", 9000)
    await service.stop()
    shown = capsys.readouterr().err
    assert "listening on http://127.0.0.1:9000 and every other address" in shown
    assert "chat page at http://127.0.0.1:9000/, API at http://127.0.0.1:9000/v1" in shown
    assert "secret" not in shown
    assert example("http://127.0.0.1:9000", service) in shown


NAME = 'it\'s 100%s \\n "mine" é'


async def test_the_example_is_a_shell_command_that_sends_valid_json(tmp_path: Path) -> None:
    """Run by a real shell, with curl replaced by a command that shows what it was given."""
    folder = small_tokenizer.save(tmp_path / NAME)
    settings = Settings(engine=EngineSettings(model=str(folder)))
    service = create_app(settings, FakeEngine(), FakeMedia()).state.service
    command = "curl() { cat; }\n" + example("http://127.0.0.1:9", service)
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    from server.schemas.chat import ChatRequest
    from server.schemas.validate import parse_request

    request, unknown = parse_request(done.stdout.encode(), ChatRequest)
    assert not unknown
    assert request.model == NAME
    assert request.messages[0].content


def test_the_help_does_not_load_the_web_framework() -> None:
    code = (
        "import sys, server.cli\n"
        "try: server.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('fastapi', 'torch', 'transformers', "
        "'httpx', 'rich', 'numpy', 'PIL', 'yaml', 'shtab', 'asyncio')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0


def test_the_log_level_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    apps: list[FastAPI] = []
    monkeypatch.setattr("server.commands.serve.logs.setup", lambda *_: None)
    monkeypatch.setattr("server.run.serve", lambda app, _: apps.append(app) or 0)
    assert main(["serve", "--log-level", "error"]) == 0
    assert apps[0].state.service.engine._log_level == "error"
