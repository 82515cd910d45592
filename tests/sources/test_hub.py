"""Fetching from the hub: the real client against a small server of our own that speaks the hub's protocol."""

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from tiny import tiny_checkpoint

from griffin_offload.errors import (
    BudgetError,
    CheckpointError,
    FetchError,
    GriffinError,
    ModelNotFound,
    UnsupportedArchitecture,
)
from griffin_offload.sources import hub
from griffin_offload.sources import resolve as models

SHA, PR_SHA = "a" * 40, "b" * 40


class Hub(ThreadingHTTPServer):
    """`files`: (hub id, commit) -> name -> bytes. `sizes` and `refuse` make it lie about a size, or say no."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.sizes: dict[str, int] = {}
        self.refuse: dict[str, tuple[int, dict[str, str]]] = {}
        self.gated_files: set[str] = set()
        self.cut: set[str] = set()
        self.offers: list[dict[str, Any]] = []
        self.sent: list[str] = []
        self.silent = threading.Event()
        self.released = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if self.server.silent.is_set():
            self.server.released.wait(20)
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.info(match[1], PR_SHA if (match[2] or "").startswith("refs/pr/") else SHA)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(\w+)", path):
            files = self.server.files[match[1], match[2]]
            tree = [{"type": "file", "path": n, "size": len(b), "oid": _etag(b)} for n, b in files.items()]
            self.reply(200, json.dumps(tree).encode())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/discussions", path):
            offers = self.server.offers  # whoever's: a mirror may not look at the author that is asked for
            self.reply(200, json.dumps({"count": len(offers), "start": 0, "discussions": offers}).encode())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            self.file(match[1], match[2], match[3])
        else:
            self.reply(404, b"{}")

    do_HEAD = do_GET  # noqa: N815

    def info(self, hub_id: str, sha: str) -> None:
        if hub_id in self.server.refuse:
            status, headers = self.server.refuse[hub_id]
            return self.reply(status, b"{}", headers)
        files = self.server.files.get((hub_id, sha))
        if files is None:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": n, "size": self.server.sizes.get(n, len(b))} for n, b in files.items()]
        told = json.loads(files.get("config.json", b"{}"))
        config = {name: told[name] for name in ("model_type", "quantization_config") if name in told} or None
        body = {"id": hub_id, "modelId": hub_id, "sha": sha, "siblings": siblings, "config": config, "tags": []}
        return self.reply(200, json.dumps(body).encode())

    def file(self, hub_id: str, sha: str, name: str) -> None:
        if hub_id in self.server.gated_files:
            return self.reply(401, b"{}", {"X-Error-Code": "GatedRepo"})
        data = self.server.files[hub_id, sha][name]
        if self.command == "GET":
            self.server.sent.append(name)
        return self.reply(200, data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": sha}, cut=name in self.server.cut)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The client pointed at our own hub, with an empty cache and no token."""
    with Hub() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        _point_at(monkeypatch, running.address, tmp_path / "hub")
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The client pointed at a port where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _point_at(monkeypatch, f"http://127.0.0.1:{port}", tmp_path / "hub")


def _point_at(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository's files: a model in two shards, and what else lies about in repositories."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("repo") / "llama", "llama", shards=2, chat=True)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    junk = ("pytorch_model.bin", "modeling_own.py", "consolidated.safetensors", "original/model.safetensors", "a.gguf")
    return files | dict.fromkeys(junk, b"junk") | {"README.md": b"# model", ".gitattributes": b""}


def test_a_repository_is_fetched_once_and_only_what_is_needed(server: Hub, sharded: dict[str, bytes]) -> None:
    server.files["own/tiny", SHA] = sharded
    told: list[tuple[str, int, int]] = []

    folder = models.resolve("own/tiny", on_progress=lambda *event: told.append(event))

    wanted = {name for name in sharded if name.endswith((".safetensors", ".json", ".jinja")) and "/" not in name}
    wanted.remove("consolidated.safetensors")
    assert {path.name for path in folder.iterdir()} == wanted
    assert all((folder / name).read_bytes() == sharded[name] for name in wanted)
    total = sum(len(sharded[name]) for name in wanted)
    assert told[0] == ("own/tiny", 0, total)
    assert told[-1] == ("own/tiny", total, total)

    server.sent.clear()
    server.silent.set()  # from here on the hub no longer answers, and is not asked
    assert models.resolve("own/tiny") == models.resolve("own/tiny", fetch=False) == models.find("own/tiny") == folder
    assert models.resolve("https://huggingface.co/own/tiny") == folder
    assert not server.sent
    local = {model.name: model for model in models.local_models()}
    assert local["own/tiny"] == models.LocalModel("own/tiny", folder, total)


def test_an_interrupted_fetch_is_no_model_and_goes_on_later(server: Hub, sharded: dict[str, bytes]) -> None:
    server.files["own/tiny", SHA] = sharded
    server.cut = {"model-00002-of-00002.safetensors"}
    with pytest.raises(FetchError):
        models.resolve("own/tiny")
    assert models.find("own/tiny") is None
    assert "own/tiny" not in {model.name for model in models.local_models()}

    server.cut.clear()
    server.sent.clear()
    assert models.resolve("own/tiny") == models.find("own/tiny")
    assert "model-00001-of-00002.safetensors" not in server.sent  # it was there already


def test_a_repository_that_lacks_a_shard_is_named(server: Hub, sharded: dict[str, bytes]) -> None:
    server.files["own/tiny", SHA] = {name: data for name, data in sharded.items() if not name.startswith("model-00002")}
    with pytest.raises(CheckpointError, match="own/tiny is not whole on the hub"):
        models.resolve("own/tiny")


def test_a_name_that_the_hub_does_not_know(server: Hub) -> None:
    with pytest.raises(ModelNotFound, match="no model own/nothing on the hub") as caught:
        models.resolve("own/nothing")
    assert not isinstance(caught.value, FetchError)


@pytest.mark.parametrize("where", ["at once", "at the files"])
def test_a_gated_model_says_where_access_is_got(server: Hub, sharded: dict[str, bytes], where: str) -> None:
    server.files["google/gemma-3-270m", SHA] = sharded
    if where == "at once":
        server.refuse["google/gemma-3-270m"] = 403, {"X-Error-Code": "GatedRepo"}
    else:
        server.gated_files.add("google/gemma-3-270m")
    with pytest.raises(FetchError, match=r"https://huggingface.co/google/gemma-3-270m.*`hf auth login`.*folder"):
        models.resolve("gemma-3-270m")  # and its wheels are no way around the gate
    assert models.find("gemma-3-270m") is None


def test_a_bad_token_is_named(server: Hub) -> None:
    server.refuse["own/tiny"] = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
    with pytest.raises(FetchError, match=r"refuses own/tiny \(401\): check the token"):
        models.resolve("own/tiny")


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_refusal_that_is_not_the_hubs_is_no_connection(server: Hub, status: int) -> None:
    server.refuse["own/tiny"] = status, {}
    with pytest.raises(hub.UnreachableError, match=r"cannot be reached"):
        models.resolve("own/tiny")


def test_no_connection_fails_fast_and_says_how_to_go_on(no_server: None) -> None:
    begin = time.monotonic()
    with pytest.raises(FetchError, match=r"cannot be reached for own/tiny.*folder.*HF_ENDPOINT.*hf download own/tiny"):
        models.resolve("own/tiny")
    assert time.monotonic() - begin < 3


def test_a_silent_hub_is_given_up(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    server.silent.set()
    begin = time.monotonic()
    with pytest.raises(hub.UnreachableError, match="no answer in"):
        models.resolve("own/tiny")
    assert time.monotonic() - begin < 3


def test_a_disk_too_small_is_refused_before_a_byte_comes(server: Hub, sharded: dict[str, bytes]) -> None:
    server.files["own/tiny", SHA] = sharded
    server.sizes = {name: 2**60 for name in sharded if name.startswith("model-0")}
    with pytest.raises(BudgetError, match=r"own/tiny needs .* GiB of disk and .* free"):
        models.resolve("own/tiny")
    assert not server.sent


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported: recurrent"),
        ({"model_type": "mllama"}, "'mllama' is not supported: its layers look at images"),
        ({"quantization_config": {"quant_method": "hqq"}}, "own/tiny: its weights are quantized by 'hqq'"),
    ],
)
def test_what_is_not_supported_is_refused_before_a_byte_comes(
    server: Hub, sharded: dict[str, bytes], fields: dict[str, Any], words: str
) -> None:
    config = json.loads(sharded["config.json"]) | fields
    server.files["own/tiny", SHA] = sharded | {"config.json": json.dumps(config).encode()}
    with pytest.raises(UnsupportedArchitecture, match=words):
        models.resolve("own/tiny")
    assert not server.sent


def test_a_wrapper_in_the_hubs_cache_is_among_the_models(server: Hub, sharded: dict[str, bytes]) -> None:
    config = json.loads(sharded["config.json"]) | {"model_type": "gemma3"}
    server.files["own/tiny", SHA] = sharded | {"config.json": json.dumps(config).encode()}
    models.resolve("own/tiny")
    assert "own/tiny" in {model.name for model in models.local_models()}


def test_pickled_weights_are_never_fetched(server: Hub, sharded: dict[str, bytes]) -> None:
    old = {name: data for name, data in sharded.items() if not name.endswith((".safetensors", ".index.json"))}
    server.files["own/old", SHA] = old
    server.files["own/old", PR_SHA] = sharded  # anybody may offer anything
    server.offers = [_offer("somebody", 3)]
    with pytest.raises(FetchError, match=r"own/old holds no safetensors files.*save_pretrained"):
        models.resolve("own/old")
    assert not server.sent


def test_an_old_repository_comes_as_the_hubs_own_bot_converted_it(server: Hub, sharded: dict[str, bytes]) -> None:
    server.files["own/old", SHA] = {n: b for n, b in sharded.items() if not n.endswith((".safetensors", "index.json"))}
    server.files["own/old", PR_SHA] = sharded
    server.offers = [_offer("somebody", 3), _offer("SFconvertbot", 7)]
    folder = models.resolve("own/old")
    assert folder.name == PR_SHA
    assert models.find("own/old") == folder
    assert "pytorch_model.bin" not in server.sent


def _offer(author: str, number: int) -> dict[str, Any]:
    return {
        "title": "Adding `safetensors` variant of this model",
        "num": number,
        "author": {"name": author},
        "createdAt": "2023-01-01T00:00:00.000Z",
        "status": "open",
        "repo": {"name": "own/old", "type": "model"},
        "isPullRequest": True,
    }


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors", "index"])
def test_a_folder_that_lacks_a_file_is_not_complete(sharded: dict[str, bytes], tmp_path: Path, lost: str) -> None:
    for name, data in sharded.items():
        if "/" not in name:
            (tmp_path / name).write_bytes(data)
    (tmp_path / "consolidated.safetensors").unlink()
    assert hub.is_complete(tmp_path)
    (tmp_path / ("model.safetensors.index.json" if lost == "index" else lost)).unlink()
    assert not hub.is_complete(tmp_path)


def test_every_failure_is_one_line(server: Hub) -> None:
    server.refuse["own/tiny"] = 500, {"X-Error-Message": "a\nb"}
    with pytest.raises(GriffinError) as caught:
        models.resolve("own/tiny")
    assert "\n" not in str(caught.value)
