"""Logs: one JSON object a line, readable lines on a terminal. Everything goes to stderr."""

import logging
import sys
from collections import deque
from typing import TextIO

import structlog
from structlog.typing import Processor

CHATTY = ("boto3", "botocore", "faster_coco_eval", "httpcore", "httpx", "matplotlib", "PIL", "urllib3")
"""Libraries that log each request or step; only their warnings are shown."""


LAST_LINES = 200
"""Lines that a process remembers for `last_log_lines`."""


class _Memory(logging.Handler):
    """Keeps the last lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[str] = deque(maxlen=LAST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def last_log_lines() -> list[str]:
    """Return what this process logged last, one JSON object a line."""
    return [line for handler in logging.getLogger().handlers if isinstance(handler, _Memory) for line in handler.lines]


def configure_logs(stream: TextIO | None = None) -> None:
    """Set up structlog and the standard logging of libraries, for the whole process.

    Args:
        stream: where the lines go; default: stderr. A terminal gets colours and short lines, all else JSON.
    """
    stream = stream or sys.stderr
    on_terminal = stream.isatty()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if on_terminal else "iso", utc=not on_terminal),
    ]
    # ASCII alone: the stream's encoding is not ours to choose, and file names may hold bytes that none knows.
    as_json: list[Processor] = [_traceback_field, structlog.processors.JSONRenderer(ensure_ascii=True)]
    last: list[Processor] = (
        # Not the rich traceback, which is the default: it shows the values of variables, secrets among them.
        [structlog.dev.ConsoleRenderer(colors=True, exception_formatter=structlog.dev.plain_traceback)]
        if on_terminal
        else as_json
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [logging.StreamHandler(stream), _Memory()]
    for handler, processors in zip(root.handlers, (last, as_json), strict=True):
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=shared,
                processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *processors],
            )
        )
    root.setLevel(logging.INFO)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


_format_exception = structlog.processors.ExceptionRenderer()


def _traceback_field(
    logger: structlog.typing.WrappedLogger, name: str, entry: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    found = _format_exception(logger, name, entry)
    if "exception" in found:
        found["traceback"] = found.pop("exception")
    return found
