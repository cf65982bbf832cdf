"""Logs: one JSON object a line, readable lines on a terminal. Everything goes to stderr."""

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import Processor

CHATTY = ("boto3", "botocore", "faster_coco_eval", "httpcore", "httpx", "matplotlib", "PIL", "urllib3")
"""Libraries that log each request or step; only their warnings are shown."""


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
    last: list[Processor] = (
        # Not the rich traceback, which is the default: it shows the values of variables, secrets among them.
        [structlog.dev.ConsoleRenderer(colors=True, exception_formatter=structlog.dev.plain_traceback)]
        if on_terminal
        # ASCII alone: the stream's encoding is not ours to choose, and file names may hold bytes that none knows.
        else [_traceback_field, structlog.processors.JSONRenderer(ensure_ascii=True)]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
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
