"""Lines of the log, as a process of its own writes them."""

import json
import subprocess
import sys
import textwrap

CODE = """
    import logging, sys, warnings
    from wire import logs
    logs.setup("info", "engine", sys.argv[1])
    with logs.about("mine"):
        logging.getLogger("a").info("two\\nlines \\ud800 %s", {"b": 1})
        try:
            1 / 0
        except ZeroDivisionError:
            logging.getLogger("a").exception("failed")
    logging.getLogger("a").debug("too much")
    warnings.warn("beware")
    logs.say("hello\\n")
"""


def lines(form: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE), form], capture_output=True, check=True
    )
    return done.stderr.decode().splitlines()


def test_json_has_an_object_a_line_whatever_is_logged() -> None:
    first, failure, warning, said = map(json.loads, lines("json"))
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "process": "engine",
        "request_id": "mine",
        "logger": "a",
        "message": "two\nlines \ud800 {'b': 1}",
    }
    assert failure["request_id"] == "mine"
    assert failure["exception"].endswith("ZeroDivisionError: division by zero")
    assert "beware" in warning["message"]
    assert (said["message"], said["request_id"]) == ("hello", "-")


def test_text_has_the_same_for_people() -> None:
    first, *rest = lines("text")
    assert first.split(" ", 1)[1] == "INFO    engine mine a: two"
    assert "hello" in rest
    assert not any("too much" in line for line in rest)
