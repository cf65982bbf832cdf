"""Waiting out what is unavailable now."""

import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from mill_shared.errors import DeviceLostError, OutsideError

log = structlog.get_logger()
T = TypeVar("T")


def wait_out(
    action: Callable[[], T], what: str, *, limit_s: float, on_wait: Callable[[], None] = lambda: None
) -> T:  # fmt: skip
    """Call until it no longer says that something outside is unavailable.

    Args:
        action: may be called again at any time.
        what: is waited for, for the log.
        limit_s: seconds after which the error is raised.
        on_wait: is called before each pause.

    Raises:
        OutsideError: it stayed unavailable; or at once where waiting cannot help (DeviceLostError).
    """

    def say(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause_s = round(state.next_action.sleep, 1) if state.next_action else 0
        log.warning("waiting", what=what, error=str(error), pause_s=pause_s)
        on_wait()

    for attempt in Retrying(
        retry=retry_if_exception(lambda e: isinstance(e, OutsideError) and not isinstance(e, DeviceLostError)),
        stop=stop_after_delay(limit_s),
        wait=wait_random_exponential(multiplier=1, max=60),
        before_sleep=say,
        sleep=time.sleep,
        reraise=True,
    ):
        with attempt:
            return action()
    raise AssertionError("unreachable: Retrying ends with a result or an error")
