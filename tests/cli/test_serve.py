"""``moesaic serve``: what is refused before the model is loaded, and how a server ends."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.serve.server.running import PATIENCE, TEMPLATE
from tests.serve.tiny import byte_tokenizer, tiny

from moesaic.cli.main import run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "demo"
    tiny("olmoe").save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere"], "no model folder at 'nowhere'"),
        (["{model}", "--adapter", "poet"], "write name=path"),
        (["{model}", "--adapter", "poet=nowhere"], "no folder at 'nowhere'"),
        (["{model}", "--adapter", "demo={model}"], "that is the base model's name"),
        (["{model}", "--adapter", "a={model}", "--adapter", "a={model}"], "given twice"),
        (["{model}", "--adapter", "a/b={model}"], "cannot name an adapter"),
        (["{model}", "--adapter-dir", "nowhere"], "no folder at 'nowhere'"),
        (["{model}", "--api-key-file", "nowhere"], "No such file"),
        (["{model}", "--api-key-file", os.devnull], "no API key in"),
        (["{model}", "--dtype", "bf17"], "did you mean 'bf16'"),
        (["{model}", "--host", "no.such.host.invalid"], "there is no host"),
        (["{model}", "--host", "192.0.2.1"], "no such address"),
        (["{model}", "--port", "70000"], "--port"),
        (["{model}", "--max-batch", "0"], "--max-batch"),
        (["{model}", "--max-context", "9999", "--port", "0"], "512"),
        (["{model}", "--adapter", "a={model}", "--port", "0"], "adapter"),
    ],
)
def test_bad_input(model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    assert run(["serve", *(word.replace("{model}", str(model)) for word in arguments)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert part in told.err
    assert told.out == ""


def test_a_port_in_use_is_told_before_the_model_is_loaded(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("moesaic.serve.server.build.load", load)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", str(model), "--port", str(taken.getsockname()[1])]) == 2
    assert "it is in use" in capsys.readouterr().err


def test_a_port_without_permission(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    assert run(["serve", str(model), "--port", "80"]) == 2
    assert "no permission: choose a --port from 1024 on" in capsys.readouterr().err


def test_without_its_packages(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("moesaic.serve.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run(["serve", str(model)]) == 2
    assert "pip install 'moesaic[serve]'" in capsys.readouterr().err


class Process:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.address = process, url.removeprefix("http://")

    def stream(self) -> http.client.HTTPResponse:
        """A chat that goes on for long, of which the first event has come."""
        self.connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        body = {"model": "demo", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
        self.connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        return response


@contextmanager
def serving(model: Path, *arguments: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "moesaic", "serve", str(model), "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        lines: queue.Queue[str] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=lambda: lines.put(process.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
        line = lines.get(timeout=PATIENCE)
        assert line.startswith("serving demo"), process.communicate(timeout=PATIENCE)
        yield Process(process, line.split()[-1])
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_requests_end(model: Path) -> None:
    with serving(model) as server:
        answer = server.stream()
        server.process.send_signal(signal.SIGTERM)
        text = answer.read()
        assert text.endswith(b"data: [DONE]\n\n")
        assert text.count(b'"finish_reason":"length"') == 1
        _, told = server.process.communicate(timeout=PATIENCE)
        assert (server.process.returncode, told) == (0, "")


@pytest.mark.slow
def test_a_second_signal_ends_them(model: Path) -> None:
    with serving(model, "--max-batch", "1") as server:
        answer = server.stream()
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        _, told = server.process.communicate(timeout=PATIENCE)
        assert server.process.returncode == 130
        assert told == "moesaic: error: ended before the requests in flight had their answers\n"
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            answer.read()


@pytest.mark.slow
def test_a_signal_while_the_model_loads(tmp_path: Path) -> None:
    script = """
import sys, threading
from moesaic.serve.server.run import serve
from moesaic.serve.server.settings import ServerSettings

def build():
    print("loading", flush=True)
    threading.Event().wait()

serve(ServerSettings("demo", port=0), build)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
