"""Logs: what a program reads off a terminal, what a person reads on one."""

import io
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from mill_shared.logs import configure_logs

SECRET = "key-5f2c"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    text = stream.getvalue()
    assert "\x1b" not in text
    assert text.isascii()
    found = [json.loads(line) for line in text.splitlines()]
    assert all({"event", "level", "timestamp"} <= entry.keys() for entry in found)
    return found


def log_something() -> None:
    structlog.get_logger().info("chunk committed", chunk=3, key="photos/caf\xe9.jpg")


def test_every_line_off_a_terminal_is_a_json_object() -> None:
    stream = io.StringIO()
    configure_logs(stream)
    log_something()
    structlog.get_logger().warning("two\nlines \x1b[31mred\x1b[0m", undecodable="a\udcff.jpg", kind=ValueError)
    (first, second) = lines(stream)
    assert (first["event"], first["level"], first["chunk"], first["key"]) == (
        "chunk committed", "info", 3, "photos/caf\xe9.jpg",
    )  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", first["timestamp"])
    assert (second["event"], second["undecodable"]) == ("two\nlines \x1b[31mred\x1b[0m", "a\udcff.jpg")


def test_what_is_bound_is_in_every_line_also_in_those_of_libraries() -> None:
    stream = io.StringIO()
    configure_logs(stream)
    structlog.contextvars.bind_contextvars(run="demo", shard="3/12", label_pass=0)
    log_something()
    logging.getLogger("some.library").warning("%d retries", 4)
    assert [(entry["event"], entry["run"], entry["shard"], entry["label_pass"]) for entry in lines(stream)] == [
        ("chunk committed", "demo", "3/12", 0),
        ("4 retries", "demo", "3/12", 0),
    ]


def test_an_exception_is_one_field_of_one_line() -> None:
    stream = io.StringIO()
    configure_logs(stream)
    for logger in (structlog.get_logger(), logging.getLogger("some.library")):
        try:
            raise ValueError("boom")
        except ValueError:
            logger.exception("failed")
    for entry in lines(stream):
        assert (entry["event"], entry["level"]) == ("failed", "error")
        assert entry["traceback"].startswith("Traceback (most recent call last):\n")
        assert entry["traceback"].endswith("ValueError: boom")
        assert "exc_info" not in entry


def test_warnings_become_lines_and_chatter_is_left_out() -> None:
    stream = io.StringIO()
    configure_logs(stream)
    log = logging.getLogger("httpx")
    log.info("HTTP Request: GET /v1/models")
    log.warning("odd")
    logging.getLogger("faster_coco_eval.core.cocoeval").info("Evaluate annotation type *bbox*")
    structlog.get_logger().debug("heartbeat not written")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("old option", DeprecationWarning, stacklevel=1)
    odd, old = lines(stream)
    assert odd["event"] == "odd"
    assert old["level"] == "warning"
    assert "old option" in old["event"]


def test_a_terminal_gets_one_short_coloured_line() -> None:
    stream = Terminal()
    configure_logs(stream)
    log_something()
    (line,) = stream.getvalue().splitlines()
    assert "\x1b[" in line
    plain = re.sub(r"\x1b\[[0-9;]*m", "", line)
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[info\s*\] chunk committed\s+chunk=3 key=photos/caf\xe9.jpg", plain)


def test_a_traceback_on_a_terminal_shows_no_values() -> None:
    stream = Terminal()
    configure_logs(stream)
    try:
        api_key = SECRET
        raise ValueError(len(api_key))
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "ValueError: 8" in stream.getvalue()
    assert SECRET not in stream.getvalue()


def test_lines_go_to_stderr_and_survive_an_ascii_locale() -> None:
    program = (
        "import structlog; from mill_shared.logs import configure_logs; configure_logs(); "
        "structlog.get_logger().info('caf\\xe9', key='a\\udcff')"
    )
    found = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", program],
        capture_output=True,
        check=True,
        env={"LC_ALL": "C", "PATH": ""},
    )
    assert found.stdout == b""
    (line,) = found.stderr.splitlines()
    assert json.loads(line)["event"] == "caf\xe9"
