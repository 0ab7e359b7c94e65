"""Reads what the user types: questions, and commands that begin with a slash."""

import contextlib
import glob
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server.shell.attachments import NoAttachment, attachment
from server.shell.paper import Paper
from server.shell.session import Refused, Session
from server.terminal import plain

PROMPT = "> "
_HISTORY = 1000
# What the shell itself sends.
_OWN = ("messages", "stream", "stream_options", "n")


class Complaint(Exception):
    """What is wrong with a command, in a line."""


class Shell:
    """A conversation with whoever is at the keyboard."""

    def __init__(self, session: Session, paper: Paper, attached: list[dict[str, Any]]) -> None:
        self._session, self._paper, self._parts = session, paper, attached

    def run(self) -> None:
        """Until the user leaves."""
        self._paper.note(f"{plain(str(self._session.options['model']))}; /help lists the commands")
        with _history():
            while True:
                try:
                    line = _read()
                except EOFError:
                    sys.stdout.write("\n")
                    return
                except KeyboardInterrupt:
                    self._paper.note("\nCtrl-D or /quit leaves")
                    continue
                except UnicodeDecodeError:
                    self._complain("what was typed is no text")
                    continue
                if line in ("/quit", "/exit"):
                    return
                with contextlib.suppress(KeyboardInterrupt):
                    self._obey(line)

    def ask(self, text: str) -> bool:
        """Ask about what is attached; whether there was an answer. Raises KeyboardInterrupt."""
        parts, self._parts = self._parts, []
        content = [*parts, {"type": "text", "text": text}] if parts else text
        return self._show(self._session.ask({"role": "user", "content": content}))

    def _obey(self, line: str) -> None:
        if not line.startswith("/"):
            if line.strip():
                self.ask(line.strip())
            return
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            self._complain(f"no command is called /{name}; /help lists them")
            return
        try:
            COMMANDS[name][0](self, rest.strip())
        except (Complaint, NoAttachment, Refused) as error:
            self._complain(str(error))

    def _show(self, pieces: Iterator[str]) -> bool:
        try:
            for piece in pieces:
                self._paper.write(piece)
        except Refused as error:
            self._paper.end()
            self._complain(str(error))
            return False
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            self._paper.end()
            self._paper.note("stopped")
            raise
        self._paper.end()
        self._paper.note(self._session.facts)
        return True

    def _complain(self, text: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(f"internvl chat: {plain(text)}\n")
        sys.stderr.flush()

    def _attach(self, kind: str, rest: str) -> None:
        names = _words(rest)
        if not names:
            raise Complaint(f"name a file or a URL: /{kind} FILE")
        for name in names:
            self._parts.append(attachment(name, kind))
            self._paper.note(f"attached: {plain(name[:200])}")

    def image(self, rest: str) -> None:
        """Show the model a picture with the next question."""
        self._attach("image", rest)

    def video(self, rest: str) -> None:
        """Show it a video with the next question."""
        self._attach("video", rest)

    def clear(self, _: str) -> None:
        """Forget the conversation and what is attached."""
        self._session.messages, self._session.last, self._parts = [], None, []
        self._paper.note("forgotten")

    def regenerate(self, _: str) -> None:
        """Answer the last question once more."""
        self._show(self._session.again())

    def system(self, rest: str) -> None:
        """Begin the conversation with this sentence; without one, as the model is used to."""
        self._session.system = rest
        self._paper.note("set" if rest else "as the model is used to")

    def set(self, rest: str) -> None:
        """Send a field with every question; without a value, no more; alone, show them."""
        name, _, value = rest.partition(" ")
        if not name:
            for key, known in self._session.options.items():
                self._paper.note(plain(f"{key} {json.dumps(known, ensure_ascii=False)}"))
        elif name in _OWN:
            raise Complaint(f"{name} is not for you to set here")
        elif value.strip():
            self._session.options[name] = _value(value.strip())
        elif name != "model":
            self._session.options.pop(name, None)

    def save(self, rest: str) -> None:
        """Write the conversation into a new file, as the body of a request."""
        names = _words(rest)
        if len(names) != 1:
            raise Complaint("name a file: /save FILE")
        try:
            with open(Path(names[0]).expanduser(), "x", encoding="utf-8") as file:
                json.dump(self._session.body(), file, ensure_ascii=False, indent=1)
        except (OSError, RuntimeError, ValueError) as error:
            raise Complaint(f"{names[0]} cannot be written: {error}") from None
        self._paper.note(f"saved: {plain(names[0])}")

    def help(self, _: str) -> None:
        """List the commands."""
        for name, (method, what) in COMMANDS.items():
            about = (method.__doc__ or "").strip()
            self._paper.note(f"/{name} {what}".ljust(22) + about)
        self._paper.note("/quit".ljust(22) + "Leave, as Ctrl-D does. Ctrl-C stops an answer.")


COMMANDS: dict[str, tuple[Callable[[Shell, str], None], str]] = {
    "image": (Shell.image, "FILE ..."),
    "video": (Shell.video, "FILE ..."),
    "clear": (Shell.clear, ""),
    "regenerate": (Shell.regenerate, ""),
    "system": (Shell.system, "[TEXT]"),
    "set": (Shell.set, "[NAME [VALUE]]"),
    "save": (Shell.save, "FILE"),
    "help": (Shell.help, ""),
}


def _words(rest: str) -> list[str]:
    try:
        return shlex.split(rest)
    except ValueError:  # such as the apostrophe of a name
        return [rest]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read() -> str:
    if sys.stdout.isatty():
        return input(PROMPT)
    # The answers go elsewhere; the question mark is for whoever types.
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return input()


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Editing, completion, and the questions of earlier days."""
    try:
        import readline
    except ImportError:  # a Python without it
        yield
        return
    home = os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    if not os.path.isabs(home):  # a user without a home, as in a container
        yield
        return
    file = Path(home, "internvl", "chat_history")
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_HISTORY)
    readline.set_completer_delims(" ")
    readline.set_completer(_complete)
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file.touch(0o600)
            readline.write_history_file(file)


def _complete(text: str, state: int) -> str | None:
    import readline

    line = readline.get_line_buffer()
    if line.startswith(("/image ", "/video ", "/save ")):
        found = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
        names = [name + "/" if os.path.isdir(name) else name for name in found]
    else:
        names = [f"/{name} " for name in (*COMMANDS, "quit") if f"/{name}".startswith(text or "x")]
    return names[state] if state < len(names) else None
