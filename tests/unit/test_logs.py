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

# What nobody expects, in the process that reads what clients send.
UNEXPECTED = """
    import gc, logging, sys, threading
    from wire import logs
    logs.setup(sys.argv[2], "api", sys.argv[1])
    def fail(secret):
        try:
            {}[secret]
        except KeyError:
            raise ExceptionGroup(secret, [ValueError(secret)])
    class Leaving:
        def __del__(self):
            fail("Kleo" + "patra")
    try:
        fail("Kleo" + "patra")
    except Exception:
        logging.getLogger("a").exception("failed")
    thread = threading.Thread(target=fail, args=("Kleo" + "patra",))
    thread.start()
    thread.join()
    Leaving()
    fail("Kleo" + "patra")
"""

# What asyncio tells of by itself: a task that nobody asks, and a callback.
UNASKED = """
    import asyncio, gc, sys
    from wire import logs
    logs.setup(sys.argv[2], "api", sys.argv[1])
    def fail(secret):
        raise ValueError(secret)
    async def fail_later(secret):
        fail(secret)
    async def main():
        task = asyncio.create_task(fail_later("Kleo" + "patra"))
        await asyncio.wait([task])
        del task
        gc.collect()
        asyncio.get_running_loop().call_soon(fail, "Kleo" + "patra")
        await asyncio.sleep(0)
    asyncio.run(main())
"""

# One exception is the reason of another, and that of the first.
CIRCLE = """
    import logging, sys
    from wire import logs
    logs.setup("info", "api", sys.argv[1])
    one, other = ValueError(), KeyError()
    one.__cause__, other.__cause__ = other, one
    group = ExceptionGroup("", [one])
    other.__context__ = group
    for error in (one, group):
        try:
            raise error
        except Exception:
            logging.getLogger("a").exception("failed")
"""


def lines(form: str, code: str = CODE, *arguments: str, status: int = 0) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), form, *arguments],
        capture_output=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
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


def test_exceptions_are_told_without_their_texts_unless_they_are_to_be_found() -> None:
    for form in ("json", "text"):
        told = "\n".join(lines(form, UNEXPECTED, "info", status=1))
        assert "Kleopatra" not in told
        assert told.count("ValueError") == told.count("KeyError") >= 4
        assert told.count("in fail") >= 8
        assert "Kleopatra" in "\n".join(lines(form, UNEXPECTED, "debug", status=1))


def test_what_asyncio_tells_of_exceptions_is_without_their_texts_too() -> None:
    for form in ("json", "text"):
        told = "\n".join(lines(form, UNASKED, "info"))
        assert "Kleopatra" not in told
        assert "Task exception was never retrieved" in told
        assert "Exception in callback fail" in told
        assert told.count("ValueError") == 2
        assert told.count("Kleopatra") < "\n".join(lines(form, UNASKED, "debug")).count("Kleopatra")


def test_exceptions_that_are_each_others_reason_are_told_once() -> None:
    for form in ("json", "text"):
        told = "\n".join(lines(form, CIRCLE))
        assert told.count("failed") == 2
        assert (told.count("ValueError"), told.count("KeyError")) == (2, 2)


def test_what_ends_a_thread_or_the_process_is_a_line_like_any_other() -> None:
    failures = list(map(json.loads, lines("json", UNEXPECTED, "info", status=1)))
    assert [failure["level"] for failure in failures] == ["error", *["critical"] * 3]
    assert all("ExceptionGroup" in failure["exception"] for failure in failures)
