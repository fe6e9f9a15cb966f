"""Adapters come and go while requests run, and only from where they may."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.serve.server.conftest import SETTINGS, Folders
from tests.serve.server.running import PATIENCE, FakeEngine, Running, fake, serving

from moesaic.errors import ConfigError
from moesaic.serve.server.build import load

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "prompt": "the moon", "extra_body": {"ignore_eos": True}}


@pytest.fixture
def server(folders: Folders) -> Iterator[Running]:
    """A server that may load adapters and has none."""
    build = lambda: load(folders.model, SETTINGS, with_pool=True)  # noqa: E731
    with serving(build, adapter_folder=folders.adapters) as running:
        yield running


def put(server: Running, name: str, path: str) -> tuple[int, dict[str, str], Any]:
    return server.ask("POST", "/v1/adapters", {"name": name, "path": path})


def names(server: Running) -> list[str]:
    return [adapter["id"] for adapter in server.ask("GET", "/v1/adapters")[2]["data"]]


def test_an_adapter_comes_and_goes(server: Running, folders: Folders) -> None:
    client = server.client()
    base = client.completions.create(model="base", **GREEDY).choices[0].text
    status, _, card = put(server, "new", "poet")
    assert status == 201
    assert (card["id"], card["state"], Path(card["path"])) == ("new", "ready", (folders.adapters / "poet").resolve())
    assert names(server) == ["new"]
    assert [model.id for model in client.models.list()] == ["base", "new"]
    assert client.completions.create(model="new", **GREEDY).choices[0].text != base
    assert server.ask("GET", "/stats")[2]["slots"]["used"] == 4
    assert put(server, "new", "law")[0] == 409
    assert server.ask("DELETE", "/v1/adapters/new")[::2] == (200, {"id": "new", "object": "adapter", "deleted": True})
    assert names(server) == []
    with pytest.raises(openai.NotFoundError, match="served: base"):
        client.completions.create(model="new", **GREEDY)
    assert server.ask("DELETE", "/v1/adapters/new")[0] == 404
    assert put(server, "new", "law")[0] == 201
    assert server.ask("DELETE", "/v1/adapters/new")[0] == 200
    assert server.ask("GET", "/stats")[2]["slots"]["used"] == 0


def test_what_is_loaded_at_the_start_is_there(served: Running) -> None:
    assert names(served) == ["poet"]


def test_a_request_in_flight_keeps_its_adapter(server: Running) -> None:
    put(server, "new", "poet")
    stream = server.client().completions.create(model="new", stream=True, **{**GREEDY, "max_tokens": 480})
    next(iter(stream))
    status, _, answer = server.ask("DELETE", "/v1/adapters/new")
    assert (status, answer["deleted"]) == (202, False)
    assert server.ask("DELETE", "/v1/adapters/new")[0] == 202
    assert put(server, "new", "law")[0] == 409
    while (use := server.ask("GET", "/stats")[2]["adapters"]) and not use[0]["running"]:
        pass
    assert use == [{"name": "new", "running": 1, "state": "unloading"}]
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model="new", **GREEDY)
    assert "".join(event.choices[0].text for event in stream)
    while names(server):
        pass
    assert server.ask("GET", "/stats")[2]["slots"]["used"] == 0


def test_adapters_come_and_go_under_traffic(server: Running) -> None:
    client = server.client()
    put(server, "stays", "law")
    alone = {model: client.completions.create(model=model, **GREEDY).choices[0].text for model in ("base", "stays")}
    ended = False

    def ask(model: str) -> set[str]:
        texts = set()
        while not ended:
            texts.add(client.completions.create(model=model, **GREEDY).choices[0].text)
        return texts

    with ThreadPoolExecutor(2) as threads:
        asked = {model: threads.submit(ask, model) for model in alone}
        try:
            for _ in range(20):
                assert put(server, "new", "poet")[0] == 201
                assert client.completions.create(model="new", **{**GREEDY, "max_tokens": 2}).choices[0].text
                assert server.ask("DELETE", "/v1/adapters/new")[0] == 200
        finally:
            ended = True
        assert {model: asked[model].result(PATIENCE) for model in alone} == {m: {text} for m, text in alone.items()}
    assert server.ask("GET", "/stats")[2]["slots"]["used"] == 4


def test_only_from_the_folder(server: Running, folders: Folders, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(folders.adapters / "poet", outside)
    (folders.adapters / "link").symlink_to(outside)
    inside = folders.adapters / "inside"
    shutil.copytree(folders.adapters / "poet", inside)
    (inside / "adapter.json").unlink()
    (inside / "adapter.json").symlink_to(outside / "adapter.json")
    (folders.adapters / "circle").symlink_to(folders.adapters / "circle")
    try:
        relative = os.path.relpath(outside, folders.adapters)
        for path in [str(outside), relative, "link", "inside", "circle", "/etc", "/nowhere", "nowhere", "a\0b"]:
            status, _, answer = put(server, "new", path)
            assert status == 400
            assert answer["error"]["message"].endswith(
                "is no adapter's folder inside the folder that this server loads adapters from"
            )
        assert put(server, "new", str(folders.adapters / "poet"))[0] == 201
    finally:
        shutil.rmtree(inside)
        (folders.adapters / "link").unlink()
        (folders.adapters / "circle").unlink()


def test_an_adapter_of_another_base_and_a_damaged_one(server: Running, folders: Folders) -> None:
    status, _, answer = put(server, "new", "stranger")
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "base" in answer["error"]["message"]
    damaged = folders.adapters / "damaged"
    shutil.copytree(folders.adapters / "poet", damaged)
    weights = damaged / "experts.safetensors"
    try:
        for content in (weights.read_bytes()[:-10], b"", b"\xff" * 100):
            weights.write_bytes(content)
            assert put(server, "new", "damaged")[0] == 400
        (damaged / "adapter.json").write_text("{")
        assert put(server, "new", "damaged")[0] == 400
    finally:
        shutil.rmtree(damaged)
    assert put(server, "new", "poet")[0] == 201
    assert server.ask("GET", "/stats")[2]["slots"]["used"] == 4


@pytest.mark.parametrize("name", ["", "a/b", "../x", "x" * 65, ".hidden", "a b", "base"])
def test_names_that_cannot_be(server: Running, name: str) -> None:
    assert put(server, name, "poet")[0] == 400


def test_without_a_folder_nothing_is_loaded() -> None:
    with serving(fake(FakeEngine())) as server:
        status, _, answer = put(server, "new", "poet")
        assert (status, answer["error"]["code"]) == (403, "adapters_closed")
        assert server.ask("DELETE", "/v1/adapters/new")[0] == 404


def test_a_page_budget_too_small_for_one_request(folders: Folders) -> None:
    small = replace(SETTINGS, kv_bytes=4096)
    with serving(lambda: load(folders.model, small)) as server:
        context = server.ask("GET", "/stats")[2]["max_context"]
        assert context < 200
        status, _, answer = server.ask("POST", "/v1/completions", {"model": "base", "prompt": "x" * 200})
        assert status == 400 and f"at most {context}" in json.dumps(answer)
        assert server.ask("POST", "/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 2})[0] == 200
    with pytest.raises(ConfigError, match="kv_bytes"):
        load(folders.model, replace(small, max_context=512))
