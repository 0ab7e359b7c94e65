"""`internvl completion`, as the shells use it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from server.commands.completion import SHELLS
from tests.servers import ROOT


def script(shell: str) -> str:
    command = [sys.executable, "-m", "server", "completion", shell]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "internvl.bash"
    file.write_text(script("bash"))
    return file


# What bash itself does when the tab key is pressed: it asks the function that is registered.
_TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
spec=$(complete -p internvl); function=${spec##*-F }; function=${function%% *}
$function internvl "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def tab(file: Path, *words: str, folder: Path = ROOT) -> list[str]:
    """What could stand in place of the last word."""
    command = ["bash", "--norc", "-c", _TAB, "bash", str(file), "internvl", *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    return [word.strip() for word in done.stdout.splitlines() if word.strip()]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ser"], ["serve"]),
        (["run"], ["run-batch"]),
        (["completion", "z"], ["zsh"]),
        (["serve", "--dev"], ["--device"]),
        (["serve", "--device", "c"], ["cpu", "cuda"]),
        (["serve", "--cuda-graphs", "t"], ["true"]),
        (["chat", "--quantization", "bnb"], ["bnb-8bit", "bnb-4bit"]),
        (["bench", "--conc"], ["--concurrency"]),
        (["run-batch", "--api-k"], ["--api-key"]),
        (["plan", "--gpu-m"], ["--gpu-memory", "--gpu-memory-utilization"]),
        (["serve", "--gpu-memory-x"], []),
    ],
)
def test_bash_completes_commands_flags_and_values(
    bash: Path, words: list[str], found: list[str]
) -> None:
    assert sorted(tab(bash, *words)) == sorted(found)


def test_bash_completes_files_and_folders(bash: Path, tmp_path: Path) -> None:
    (tmp_path / "my.toml").touch()
    (tmp_path / "models").mkdir()
    assert set(tab(bash, "serve", "--config", "m", folder=tmp_path)) == {"models", "my.toml"}
    assert tab(bash, "serve", "--model", "m", folder=tmp_path) == ["models"]
    assert tab(bash, "run-batch", "--output", "my", folder=tmp_path) == ["my.toml"]
    assert tab(bash, "chat", "my", folder=tmp_path) == ["my.toml"]


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_takes_its_script(shell: str, tmp_path: Path) -> None:
    """Help texts have quotes and backticks in them: nothing of it may run."""
    text = script(shell)
    assert "internvl" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / "script"
    file.write_text(text)
    command = f"source {file}"
    if shell == "zsh":
        command = f'autoload -Uz compinit && compinit -u -D; eval "$(<{file})"'
    flags = ["-f"] if shell in ("zsh", "tcsh") else []
    done = subprocess.run(
        [shell, *flags, "-c", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},  # without internvl
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
