"""Vision-language models behind an OpenAI-compatible server, e.g. vLLM.

Region pictures and the questions leave this machine, nothing else. Short troubles are tried again here, long ones are
the label loop's to wait out.
"""

import base64
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import cv2
import httpx
import msgspec
import numpy as np
from numpy.typing import NDArray
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from mill_shared.errors import ConfigError, OutsideError
from mill_shared.models.config import HttpChatConfig
from mill_shared.models.protocols import Answer, Question

ATTEMPTS = 5
"""How often one question is sent before the server counts as unavailable."""

_BACKOFF = wait_random_exponential(multiplier=0.5, max=8)  # random, so that workers do not come back all at once
_REFUSED_QUESTION = (400, 413, 422)
_REFUSED_KEY = (401, 403)
_BUSY = (408, 425, 429)


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Unavailable(OutsideError):
    """Worth another attempt, not before the seconds that the server asks for."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class HttpChat:
    """Asks a server, a bounded number of questions at once."""

    def __init__(self, config: HttpChatConfig, *, sleep: Callable[[float], None] | None = None) -> None:
        """Check the settings and read the key; the server is not called.

        Args:
            config: Which server, and how it is asked.
            sleep: Waits the given seconds between attempts; default: the real thing, ended early once a question of
                the same call is lost.

        Raises:
            ConfigError: the URL or the key file is unusable.
        """
        self._config, self._sleep = config, sleep
        self._endpoint = _endpoint(config.url)
        self._key = None if config.key_file is None else _read_key(config.key_file)

    def halve_batch(self) -> bool:
        """Return False: the memory is the server's."""
        return False

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return one answer a question, in order. A question that the server refuses costs its own answer alone.

        Raises:
            OutsideError: the server does not answer, or not as a chat server does.
            ConfigError: the key, the model or the URL is wrong, or the server ignores the allowed answers.
        """
        if not questions:
            return []
        workers = min(self._config.concurrency, len(questions))
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        lost = threading.Event()
        # A client a call: connections live as long as there are questions, and nobody has to close it.
        with (
            httpx.Client(
                headers=headers,
                timeout=self._config.timeout_s,
                limits=httpx.Limits(max_connections=workers, max_keepalive_connections=workers),
            ) as client,
            ThreadPoolExecutor(workers, thread_name_prefix="chat") as pool,
        ):
            futures: list[Future[Answer]] = [pool.submit(self._ask, client, lost, item) for item in questions]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                return [future.result() for future in futures]
            finally:
                lost.set()
                pool.shutdown(cancel_futures=True)

    def _ask(self, client: httpx.Client, lost: threading.Event, question: Question) -> Answer:
        def pause(seconds: float) -> None:
            lost.wait(seconds)

        retrying = Retrying(
            retry=retry_if_exception_type(_Unavailable),
            stop=lambda state: lost.is_set() or state.attempt_number >= ATTEMPTS,
            wait=lambda state: max(_BACKOFF(state), _retry_after_s(state)),
            sleep=self._sleep or pause,
            reraise=True,
        )
        body = msgspec.json.encode(self._body(question))
        return retrying(self._send, client, body, question.choices)

    def _body(self, question: Question) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(question.picture_rgb)}},
            {"type": "text", "text": question.text},
        ]
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self._config.max_new_tokens,
        }
        if question.choices is not None:
            match self._config.constrain:
                case "structured_outputs":
                    body["structured_outputs"] = {"choice": list(question.choices)}
                case "guided_choice":  # vLLM 0.12 dropped this form and passes over it in silence; see _read
                    body["guided_choice"] = list(question.choices)
                case "none":
                    pass
        return body

    def _send(self, client: httpx.Client, body: bytes, choices: Sequence[str] | None) -> Answer:
        try:
            response = client.post(self._endpoint, content=body)
        except httpx.RequestError as error:
            raise _Unavailable(f"chat server {self._endpoint}: {type(error).__name__}: {error}") from error
        status = response.status_code
        said = f"chat server {self._endpoint}: HTTP {status}: {self._excerpt(response)}"
        if status in _REFUSED_QUESTION:
            return Answer("", error=said)
        if status in _REFUSED_KEY:
            source = self._config.key_file or "no key_file is set"
            raise ConfigError(f"chat server {self._endpoint}: HTTP {status}: it refuses the key ({source})")
        if status in _BUSY or status >= 500:
            retry_after_s = _parse_retry_after(response.headers.get("Retry-After"))
            if retry_after_s > self._config.timeout_s:
                raise OutsideError(f"{said}; it asks for a pause of {retry_after_s:.0f} s")
            raise _Unavailable(said, retry_after_s)
        if status != 200:
            raise ConfigError(f"{said}; check url, and whether it serves the model {self._config.model!r}")
        return self._read(response, choices)

    def _read(self, response: httpx.Response, choices: Sequence[str] | None) -> Answer:
        try:
            choice = msgspec.json.decode(response.content, type=_Completion).choices[0]
        except (msgspec.MsgspecError, UnicodeDecodeError, IndexError) as error:
            raise _Unavailable(
                f"chat server {self._endpoint}: not a chat completion ({error}): {self._excerpt(response)}"
            ) from error
        text = choice.message.content
        if text is None:
            return Answer("", error=f"chat server {self._endpoint}: no text, finish_reason {choice.finish_reason}")
        whole = choice.finish_reason == "stop"
        if choices is not None and self._config.constrain != "none" and whole and text.strip() not in choices:
            raise ConfigError(
                f"chat server {self._endpoint}: answered {text[:80]!r} where only {', '.join(choices)} are allowed; "
                f"it passes over {self._config.constrain}, set constrain to what it knows or to none"
            )
        return Answer(text)

    def _excerpt(self, response: httpx.Response) -> str:
        """Return the start of the body on one line, without the key should the server repeat it."""
        text = response.content[:2000].decode("utf-8", "replace")
        if self._key is not None:
            text = text.replace(self._key, "[key]")
        return " ".join(text.split())[:200]


def _endpoint(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"chat server url: {error}; expected a base URL such as http://host:8000/v1") from error
    if parsed.userinfo:
        raise ConfigError(f"chat server at {parsed.host}: its url holds a password; put the key into key_file")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise ConfigError(f"chat server url {url!r}: expected a base URL such as http://host:8000/v1")
    return f"{url.rstrip('/')}/chat/completions"


def _read_key(path: Path) -> str:
    try:
        key = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(f"key_file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise ConfigError(f"key_file {path}: expected one line with the key and nothing else")
    return key


def _data_url(picture_rgb: NDArray[np.uint8]) -> str:
    """Return the picture as a PNG, which loses nothing."""
    encoded, png = cv2.imencode(".png", cv2.cvtColor(picture_rgb, cv2.COLOR_RGB2BGR))
    assert encoded, "a PNG can hold any picture"
    return "data:image/png;base64," + base64.b64encode(png.tobytes()).decode("ascii")


def _retry_after_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    return error.retry_after_s if isinstance(error, _Unavailable) else 0.0


def _parse_retry_after(value: str | None) -> float:
    """Return the header's seconds from now, 0 where it says nothing usable. It holds seconds or a date."""
    if value is None:
        return 0.0
    try:
        return max(
            0.0, float(int(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time())
        )
    except ValueError:
        return 0.0
