"""What is not let in, and what becomes of requests that cannot end well: around an engine that a test holds."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from tests.serve.server.running import PATIENCE, FakeEngine, Running, fake, serving

from moesaic.errors import ConfigError, UnsupportedError
from moesaic.serve.server import gate
from moesaic.serve.server.gate import is_loopback

BODY = {"model": "base", "prompt": "hi", "max_tokens": 3}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Running]:
    with serving(fake(engine)) as running:
        yield running


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """For tests that change nothing."""
    with serving(fake(FakeEngine())) as running:
        yield running


def error_of(answer: tuple[int, dict[str, str], Any]) -> dict[str, Any]:
    status, headers, body = answer
    assert status >= 400
    assert headers["content-type"] == "application/json"
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/page/..%2f..%2frun.py", 404),
        ("GET", "/v1/completions/", 404),
    ],
)
def test_wrong_paths_and_methods(shared: Running, method: str, path: str, status: int) -> None:
    answer = shared.ask(method, path)
    assert answer[0] == status
    error_of(answer)
    assert (answer[1].get("allow") is not None) == (status == 405)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        (b'{"model": "base", "prompt": "\\ud800"}', "prompt"),
        (b'{"model": "base", "prompt": "hi", "temperature": NaN}', "temperature"),
        (b'{"model": "base", "prompt": "hi", "max_tokens": ' + b"9" * 5000 + b"}", None),
        (b"null", None),
        (b"[]", None),
        ({"model": "base"}, "prompt"),
        ({**BODY, "max_tokens": 0}, "max_tokens"),
        ({**BODY, "max_tokens": "3"}, "max_tokens"),
        ({**BODY, "temprature": 1}, "temprature"),
        ({**BODY, "echo": True}, "echo"),
    ],
)
def test_bodies_that_cannot_be_read(shared: Running, body: Any, param: str | None) -> None:
    answer = shared.ask("POST", "/v1/completions", body)
    assert answer[0] == 400
    error = error_of(answer)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_body_without_json_is_refused(shared: Running) -> None:
    answer = shared.ask("POST", "/v1/completions", json.dumps(BODY).encode(), {"Content-Type": "text/plain"})
    assert answer[0] == 415
    error_of(answer)
    assert shared.ask("POST", "/v1/completions")[0] == 400


def test_a_body_too_large_is_refused_before_it_is_read(engine: FakeEngine) -> None:
    with serving(fake(engine), max_body=1000) as server:
        assert error_of(server.ask("POST", "/v1/completions", b" " * 1001))["code"] == "body_too_large"
        connection = server.connect()
        # Not one byte of it is sent.
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Length", str(10**12))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()
        connection = server.connect()
        connection.request("POST", "/v1/completions", iter([b" " * 600] * 2), encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert server.ask("POST", "/v1/completions", json.dumps(BODY).encode() + b" " * 900)[0] == 200


def test_bodies_together_do_not_fill_the_memory(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MOST_BODIES", 2)
    with serving(fake(engine), max_body=1000) as server:
        slow = [server.connect() for _ in range(2)]
        for connection in slow:
            connection.putrequest("POST", "/v1/completions")
            connection.putheader("Content-Length", "1000")
            connection.endheaders(b" " * 990)
        until = time.monotonic() + PATIENCE
        while (answer := server.ask("POST", "/v1/completions", BODY))[0] != 429 and time.monotonic() < until:
            pass  # the server has not read them yet
        assert error_of(answer)["code"] == "queue_full" and answer[1]["retry-after"]
        for connection in slow:
            connection.close()
        while (answer := server.ask("POST", "/v1/completions", BODY))[0] != 200 and time.monotonic() < until:
            pass
        assert answer[0] == 200


def test_unknown_models_are_answered_with_the_known_ones(shared: Running) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'nobody'.* base") as caught:
        shared.client().completions.create(model="nobody", prompt="hi")
    assert caught.value.code == "model_not_found"
    assert error_of(shared.ask("GET", "/v1/models/nobody"))["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("no such\nthing"), 400), (UnsupportedError("cannot"), 501), (KeyError("x"), 500)]
)
def test_what_the_engine_refuses_is_told(server: Running, engine: FakeEngine, error: Any, status: int) -> None:
    engine.refuses = error
    answer = server.ask("POST", "/v1/completions", BODY)
    assert answer[0] == status
    assert ("no such thing" in error_of(answer)["message"]) == (status == 400)
    engine.refuses = None
    assert server.ask("POST", "/v1/completions", BODY)[0] == 200


def test_limits_of_prompts_and_tokens(engine: FakeEngine) -> None:
    with serving(fake(engine), max_prompt=30, max_tokens=6) as server:
        error = error_of(server.ask("POST", "/v1/completions", {**BODY, "prompt": "x" * 31}))
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        assert error_of(server.ask("POST", "/v1/completions", {**BODY, "max_tokens": 7}))["param"] == "max_tokens"
        # A chat says nothing of it: it ends at the limit.
        chat = server.client().chat.completions.create(model="base", messages=[{"role": "user", "content": ""}])
        assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("aaaaaa", "length")


def test_one_key_of_several_lets_in(engine: FakeEngine) -> None:
    from moesaic.serve.server.settings import ApiKeys

    with serving(fake(engine), keys=ApiKeys(["first", "second"])) as server:
        for path in ("/v1/models", "/stats", "/metrics", "/v1/adapters", "/nothing"):
            answer = server.ask("GET", path)
            assert answer[0] == 401
            assert answer[1]["www-authenticate"] == "Bearer"
            assert error_of(answer)["code"] == "invalid_api_key"
        for path in ("/", "/health", "/ready", "/openapi.json", "/page/style.css"):
            assert server.ask("GET", path)[0] == 200
        for key in ("first", "second"):
            assert (
                server.client(key).completions.create(model="base", prompt="hi", max_tokens=2).choices[0].text == "aa"
            )
        for header in ("Bearer", "Bearer firs", "Bearer firstt", "Basic first", "first", "Bearer fïrst"):
            assert server.ask("GET", "/v1/models", headers={"Authorization": header.encode("latin-1")})[0] == 401  # type: ignore[dict-item]
        operations = server.ask("GET", "/openapi.json")[2]["paths"]
        assert operations["/v1/models"]["get"]["security"] == [{"key": []}]
        assert operations["/health"]["get"]["security"] == []


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:1", 200), ("localhost", 200), ("[::1]:80", 200), ("a.localhost", 200), ("evil.example:80", 403)],
)
def test_other_names_are_not_answered_to_without_keys(shared: Running, host: str, status: int) -> None:
    assert shared.ask("GET", "/v1/models", headers={"Host": host})[0] == status


@pytest.mark.parametrize(
    ("host", "is_own"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.1", True), ("0.0.0.0", False), ("::", False)],
)
def test_what_only_this_machine_reaches(host: str, is_own: bool) -> None:
    assert is_loopback(host) is is_own


def test_a_full_queue_says_when_to_come_again(engine: FakeEngine) -> None:
    engine.paused = True
    with serving(fake(engine), max_batch=2, max_queue=1) as server, ThreadPoolExecutor(2) as threads:
        waiting = [
            threads.submit(server.client().completions.create, model="base", prompt="hi", n=n, max_tokens=2)
            for n in (1, 2)
        ]
        while server.service._sequences < 3:
            assert server.ask("GET", "/health")[0] == 200
        answer = server.ask("POST", "/v1/completions", BODY)
        assert answer[0] == 429
        assert int(answer[1]["retry-after"]) >= 1
        assert error_of(answer)["code"] == "queue_full"
        assert server.ask("POST", "/v1/completions", {**BODY, "n": 4})[0] == 400
        server.resume()
        assert sorted(len(one.result(PATIENCE).choices) for one in waiting) == [1, 2]
        assert server.ask("POST", "/v1/completions", BODY)[0] == 200
        assert server.service._sequences == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(server: Running, engine: FakeEngine, stream: bool) -> None:
    engine.paused = True
    body = json.dumps({**BODY, "n": 2, "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(head.encode() + body)
        while not engine.added:
            assert server.ask("GET", "/health")[0] == 200
    assert engine.was_cancelled.wait(PATIENCE)
    server.resume()
    while server.service._sequences:
        assert server.ask("GET", "/health")[0] == 200
    assert server.service._inboxes == {}


def test_a_step_that_fails_ends_what_runs_and_nothing_else(
    server: Running, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.paused = True
    client = server.client()
    stream = client.completions.create(model="base", prompt="hi", max_tokens=4, stream=True)
    with ThreadPoolExecutor(1) as threads:
        whole = threads.submit(server.ask, "POST", "/v1/completions", BODY)
        while len(engine.added) < 2:
            assert server.ask("GET", "/health")[0] == 200
        engine.raises.append(RuntimeError("out of luck"))
        server.resume()
        error = error_of(whole.result(PATIENCE))
    assert (error["type"], error["code"]) == ("server_error", "engine_failed")
    assert "luck" not in error["message"]
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(stream)
    assert [record.message for record in caplog.records if record.name == "moesaic.serve"] == [
        "a step of the engine failed; 2 requests end with an error"
    ]
    assert client.completions.create(model="base", prompt="hi", max_tokens=2).choices[0].text == "aa"
    assert server.ask("GET", "/health")[0] == 200


def test_a_step_that_fails_does_not_end_what_waits(server: Running, engine: FakeEngine) -> None:
    engine.paused, engine.batch = True, 1
    engine.raises.append(RuntimeError("out of luck"))
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(server.ask, "POST", "/v1/completions", BODY) for _ in range(3)]
        while len(engine.added) < 3:
            assert server.ask("GET", "/health")[0] == 200
        server.resume()
        assert sorted(one.result(PATIENCE)[0] for one in asked) == [200, 200, 500]


def test_an_engine_beyond_repair_is_told_by_health(engine: FakeEngine) -> None:
    engine.raises += [RuntimeError("again")] * 3
    with serving(fake(engine)) as server:
        assert [server.ask("POST", "/v1/completions", BODY)[0] for _ in range(4)] == [500, 500, 500, 503]
        assert server.ask("GET", "/health")[::2] == (503, {"status": "failed"})
        assert server.ask("GET", "/ready")[::2] == (503, {"ready": False, "state": "failed"})
        assert server.ask("GET", "/stats")[2]["state"] == "failed"


def test_while_the_model_loads(engine: FakeEngine) -> None:
    loaded = threading.Event()

    def build() -> Any:
        assert loaded.wait(PATIENCE)
        return fake(engine)()

    with serving(build, wait=False) as server:
        assert server.ask("GET", "/health")[0] == 200
        assert server.ask("GET", "/ready")[::2] == (503, {"ready": False, "state": "loading"})
        answer = server.ask("POST", "/v1/completions", BODY)
        assert (answer[0], error_of(answer)["code"]) == (503, "loading")
        assert answer[1]["retry-after"]
        assert server.ask("GET", "/stats")[2]["state"] == "loading"
        loaded.set()
        while server.ask("GET", "/ready")[0] != 200:
            pass
        assert server.ask("POST", "/v1/completions", BODY)[0] == 200


def test_what_is_in_flight_ends_before_the_server_does(engine: FakeEngine) -> None:
    engine.paused = True
    with serving(fake(engine), drain_seconds=PATIENCE) as server, ThreadPoolExecutor(1) as threads:
        whole = threads.submit(server.ask, "POST", "/v1/completions", BODY)
        while not engine.added:
            assert server.ask("GET", "/health")[0] == 200
        server.server.handle_exit(15, None)
        assert server.changed.wait(PATIENCE)
        with pytest.raises(OSError):
            server.ask("GET", "/health")
        server.resume()
        status, _, body = whole.result(PATIENCE)
        assert (status, body["choices"][0]["text"]) == (200, "aaa")


def test_what_does_not_end_in_time_is_told_so(engine: FakeEngine) -> None:
    engine.paused = True
    with serving(fake(engine), drain_seconds=0.0) as server:
        stream = server.client().completions.create(model="base", prompt="hi", stream=True)
        server.server.handle_exit(15, None)
        with pytest.raises(openai.APIError, match="shut down"):
            list(stream)


def test_a_second_signal_does_not_wait(engine: FakeEngine) -> None:
    engine.paused = True
    with serving(fake(engine), drain_seconds=PATIENCE) as server:
        stream = server.client().completions.create(model="base", prompt="hi", stream=True)
        for _ in range(2):
            server.server.handle_exit(2, None)
        with pytest.raises((openai.APIError, openai.APIConnectionError)):
            list(stream)
