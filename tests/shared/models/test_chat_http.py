"""The HTTP adapter against a real server on loopback."""

import base64
import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from mill_shared.errors import ConfigError, OutsideError
from mill_shared.models.chat_http import ATTEMPTS, HttpChat
from mill_shared.models.config import HttpChatConfig
from mill_shared.models.protocols import Answer, Question

KEY = "sk-very-secret-0123456789"


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    path: str
    authorization: str | None
    body: dict[str, Any]

    @property
    def text(self) -> str:
        text: str = self.body["messages"][0]["content"][1]["text"]
        return text


class ChatServer:
    """Answers with `respond`; keeps the requests and the greatest number that were in hand at once."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.respond: Callable[[Request], Reply] = lambda request: said(f"about {request.text}")
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = outer._answer(Request(self.path, self.headers["Authorization"], body))
                self.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the client no longer waits
                    self.wfile.write(reply.body)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def _answer(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.respond(request)
        finally:
            with self._lock:
                self._now -= 1

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    running = ChatServer()
    yield running
    running.close()


def test_picture_text_and_settings_arrive_and_answers_come_in_order(server: ChatServer) -> None:
    questions = [Question(_picture(seed=number), f"question {number}") for number in range(6)]

    def respond(request: Request) -> Reply:
        time.sleep(0.02 * (5 - int(request.text.split()[1])))
        return said(f"about {request.text}")

    server.respond = respond
    assert _chat(server).ask(questions) == [Answer(f"about question {number}") for number in range(6)]
    by_text = {request.text: request for request in server.requests}
    for question in questions:
        request = by_text[question.text]
        assert request.path == "/v1/chat/completions"
        assert request.authorization is None
        assert request.body["model"] == "qwen"
        assert request.body["temperature"] == 0
        assert request.body["max_tokens"] == 128
        (message,) = request.body["messages"]
        assert message["role"] == "user"
        assert [part["type"] for part in message["content"]] == ["image_url", "text"]
        assert np.array_equal(_decoded(message["content"][0]["image_url"]["url"]), question.picture_rgb)


@pytest.mark.parametrize(
    ("constrain", "sent"),
    [
        ("structured_outputs", {"structured_outputs": {"choice": ["Yes", "No"]}}),
        ("guided_choice", {"guided_choice": ["Yes", "No"]}),
        ("none", {}),
    ],
)
def test_allowed_answers_are_sent_as_the_config_says(server: ChatServer, constrain: str, sent: dict[str, Any]) -> None:
    server.respond = lambda _: said("Yes")
    chat = _chat(server, constrain=constrain)
    assert chat.ask([Question(_picture(), "present?", ("Yes", "No"))]) == [Answer("Yes")]
    body = server.requests[0].body
    assert {key: body[key] for key in ("structured_outputs", "guided_choice") if key in body} == sent


def test_free_text_is_not_constrained(server: ChatServer) -> None:
    _chat(server).ask([_question()])
    assert {"structured_outputs", "guided_choice"}.isdisjoint(server.requests[0].body)


def test_a_server_that_passes_over_the_constraint_is_a_config_error(server: ChatServer) -> None:
    server.respond = lambda _: said("I think so")
    constrained = [Question(_picture(), "present?", ("Yes", "No"))]
    with pytest.raises(ConfigError, match=r"'I think so'.*structured_outputs"):
        _chat(server).ask(constrained)
    assert _chat(server, constrain="none").ask(constrained) == [Answer("I think so")]


def test_never_more_requests_at_once_than_the_config_says(server: ChatServer) -> None:
    together = threading.Barrier(3)

    def respond(request: Request) -> Reply:
        together.wait(timeout=30)  # breaks, and fails the test, unless three are in hand at once
        return said(request.text)

    server.respond = respond
    questions = [Question(_picture(), f"question {number}") for number in range(12)]
    answers = _chat(server, concurrency=3).ask(questions)
    assert [answer.text for answer in answers] == [question.text for question in questions]
    assert server.most_at_once == 3


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_troubles_are_tried_again(server: ChatServer, status: int) -> None:
    server.respond = lambda _: said("cat") if len(server.requests) == 3 else Reply(status)
    pauses: list[float] = []
    assert _chat(server, pauses).ask([_question()]) == [Answer("cat")]
    assert len(pauses) == 2
    assert all(pause <= 8 for pause in pauses)


def test_retry_after_is_respected_in_seconds_and_as_a_date(server: ChatServer) -> None:
    replies = [
        Reply(429, headers={"Retry-After": "17"}),
        Reply(503, headers={"Retry-After": formatdate(time.time() + 60, usegmt=True)}),
        Reply(503, headers={"Retry-After": "soon"}),
        said("cat"),
    ]
    server.respond = lambda _: replies[len(server.requests) - 1]
    pauses: list[float] = []
    assert _chat(server, pauses).ask([_question()]) == [Answer("cat")]
    assert pauses[0] == 17
    assert 30 < pauses[1] <= 60
    assert pauses[2] <= 8


def test_a_long_retry_after_is_left_to_the_label_loop(server: ChatServer) -> None:
    server.respond = lambda _: Reply(429, headers={"Retry-After": "3600"})
    with pytest.raises(OutsideError, match="3600 s"):
        _chat(server).ask([_question()])
    assert len(server.requests) == 1


def test_lasting_troubles_are_an_outside_error(server: ChatServer) -> None:
    server.respond = lambda _: Reply(503, b"engine is\n loading")
    with pytest.raises(OutsideError, match="HTTP 503: engine is loading"):
        _chat(server).ask([_question()])
    assert len(server.requests) == ATTEMPTS


def test_a_server_that_is_gone_is_an_outside_error() -> None:
    gone = ChatServer()
    gone.close()
    pauses: list[float] = []
    with pytest.raises(OutsideError, match=f"{gone.url}.*ConnectError"):
        _chat(gone, pauses).ask([_question()])
    assert len(pauses) == ATTEMPTS - 1


def test_a_server_that_hangs_is_an_outside_error(server: ChatServer) -> None:
    done = threading.Event()
    server.respond = lambda _: said("late") if done.wait(30) else Reply(500)
    try:
        with pytest.raises(OutsideError, match="ReadTimeout"):
            _chat(server, timeout_s=0.1).ask([_question()])
    finally:
        done.set()
    assert len(server.requests) == ATTEMPTS


def test_one_lost_question_ends_the_call_without_waiting_for_the_others(server: ChatServer) -> None:
    def respond(request: Request) -> Reply:
        if request.text == "question 1":
            return Reply(404, b'{"error": {"message": "no such model"}}')
        return Reply(503, headers={"Retry-After": "100"})

    server.respond = respond
    chat = HttpChat(_config(server, concurrency=2))  # the real pauses, which the lost question ends
    with pytest.raises(ConfigError, match="no such model"):
        chat.ask([Question(_picture(), f"question {number}") for number in range(20)])
    assert len(server.requests) < 20


@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b'{"choices": []}', b'{"choices": [{}]}', b"\xff", b""])
def test_what_is_no_chat_completion_is_an_outside_error(server: ChatServer, body: bytes) -> None:
    server.respond = lambda _: Reply(200, body)
    with pytest.raises(OutsideError, match="not a chat completion"):
        _chat(server).ask([_question()])
    assert len(server.requests) == ATTEMPTS


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_question_costs_its_own_answer_alone(server: ChatServer, status: int) -> None:
    def respond(request: Request) -> Reply:
        bad = request.text == "question 1"
        return Reply(status, b'{"message": "image too large"}') if bad else said(request.text)

    server.respond = respond
    answers = _chat(server).ask([Question(_picture(), f"question {number}") for number in range(3)])
    assert [answer.text for answer in answers] == ["question 0", "", "question 2"]
    assert answers[0].error is None
    assert f"HTTP {status}: " in str(answers[1].error)
    assert "image too large" in str(answers[1].error)


def test_an_answer_without_text_is_an_error_of_its_question(server: ChatServer) -> None:
    server.respond = lambda _: said(None, finish_reason="length")
    (answer,) = _chat(server).ask([_question()])
    assert "finish_reason length" in str(answer.error)


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses the key"), (403, "refuses the key"), (404, "'qwen'"), (301, "check url")]
)
def test_wrong_settings_are_a_config_error_at_once(server: ChatServer, status: int, message: str) -> None:
    server.respond = lambda _: Reply(status, headers={"Location": "http://127.0.0.1:1/"})
    with pytest.raises(ConfigError, match=message):
        _chat(server).ask([_question()])
    assert len(server.requests) == 1


def test_the_key_is_sent_and_shown_nowhere(
    server: ChatServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key_file = tmp_path / "key"
    key_file.write_text(f"{KEY}\n")
    chat = _chat(server, key_file=key_file)
    chat.ask([_question()])
    assert server.requests[0].authorization == f"Bearer {KEY}"
    shown = [repr(chat), caplog.text]
    for status in (400, 401, 404):
        server.respond = _always(Reply(status, f"wrong key {KEY}".encode()))
        try:
            shown.append(str(chat.ask([_question()])))
        except ConfigError as error:
            shown.append(str(error))
    assert not any(KEY in text for text in shown)
    assert "wrong key [key]" in shown[2]


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"two\nlines", b"\xff\xfe"])
def test_an_unusable_key_file_is_a_config_error_that_hides_the_key(tmp_path: Path, content: bytes) -> None:
    key_file = tmp_path / "key"
    key_file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"expected one line with the key and nothing else$"):
        HttpChat(_config("http://127.0.0.1:1/v1", key_file=key_file))


def test_a_missing_key_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        HttpChat(_config("http://127.0.0.1:1/v1", key_file=tmp_path / "absent"))


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http:///v1", "http://host/v1?x=1", "http://host:x/v1"]
)
def test_an_unusable_url_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="expected a base URL"):
        HttpChat(_config(url))


def test_a_password_in_the_url_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="key_file") as raised:
        HttpChat(_config("http://user:hunter2@host/v1"))
    assert "hunter2" not in str(raised.value)


def test_a_remote_model_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from mill_shared.models.config import HttpChatConfig\n"
        "from mill_shared.models.factory import build_chat_model\n"
        "assert 'httpx' not in sys.modules\n"
        "chat = build_chat_model(HttpChatConfig(url='http://127.0.0.1:1/v1', model='qwen', revision='test'))\n"
        "print(type(chat).__name__, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "HttpChat False\n"


def test_nothing_asked_nothing_sent(server: ChatServer) -> None:
    assert _chat(server).ask([]) == []
    assert server.requests == []


def said(text: str | None, finish_reason: str = "stop") -> Reply:
    message: dict[str, object] = {"role": "assistant", "content": text, "tool_calls": []}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    return Reply(200, json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode())


def _always(reply: Reply) -> Callable[[Request], Reply]:
    return lambda _: reply


def _picture(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def _question() -> Question:
    return Question(_picture(), "what?")


def _decoded(url: str) -> NDArray[np.uint8]:
    kind, data = url.split(",", 1)
    assert kind == "data:image/png;base64"
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), dtype=np.uint8), cv2.IMREAD_COLOR_RGB)
    assert picture is not None
    return picture.astype(np.uint8)


def _config(server: ChatServer | str, **settings: Any) -> HttpChatConfig:
    url = server if isinstance(server, str) else server.url
    return HttpChatConfig(url=url, model="qwen", revision="test", **settings)


def _chat(server: ChatServer, pauses: list[float] | None = None, **settings: Any) -> HttpChat:
    recorded = [] if pauses is None else pauses
    return HttpChat(_config(server, **settings), sleep=recorded.append)
