"""A push to the hub and back, against a local server that speaks as much of the hub's API as that takes."""

import base64
import json
import os
import re
import subprocess
import sys
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest
from fixtures.make_adapters import FOLDER

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, "someone/adapter"; no big files, no history."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            said = json.loads(body)
            self.server.created.append(said.get("private") or said.get("visibility") == "private")
            self.answer({"name": "someone/adapter", "url": f"{self.server.url}/someone/adapter"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif "/commit/" in self.path:
            self.server.commits.append(unquote(self.path.rpartition("/")[2].partition("?")[0]))
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.messages.append(line["value"]["summary"])
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/someone/adapter/commit/{COMMIT}"
            self.answer({"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        elif "/branch/" in self.path or self.path == "/api/validate-yaml":
            self.answer({})
        else:
            self.answer({"error": "not found"}, 404)

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        name = re.fullmatch(rf"/someone/adapter/resolve/(?:main|later|{COMMIT})/(.+)", path)
        if name and name[1] in self.server.files:
            content = self.server.files[name[1]]
            self.answer(content, headers={"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        elif "/resolve/" in path and not name:
            self.answer({}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif name:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif self.path.startswith("/api/models/someone/adapter"):
            files = [{"rfilename": name} for name in self.server.files]
            self.answer({"id": "someone/adapter", "sha": COMMIT, "siblings": files, "tags": []})
        else:
            self.answer({"error": "not found"}, 404)

    do_HEAD = do_GET

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.commits = f"http://127.0.0.1:{server.server_port}", {}, []
    server.created, server.messages = [], []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(code: str, hub: ThreadingHTTPServer, home: Path) -> str:
    """Run code in a process whose hub is the local one; returns what it prints."""
    tests = Path(__file__).parent
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(tests), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    common = "import torch, smt_peft\nfrom peft import PeftModel\nfrom fixtures.make_adapters import *\n"
    done = subprocess.run([sys.executable, "-c", common + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


PUSH = """
model = make("tiles")
model.push_to_hub("adapter", tags=["mine"], commit_message="First", private=True)
model.push_to_hub("someone/adapter", revision="later")
"""
LOAD = """
from transformers import AutoModelForCausalLM
tokens, expected = torch.arange(1, 9)[None], make("tiles").eval()
by_peft = PeftModel.from_pretrained(make_base(), "someone/adapter")
by_transformers = make_base()
by_transformers.load_adapter("someone/adapter")
for model in (by_peft, by_transformers):
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
"""
LOAD_IN_TRANSFORMERS = """
from huggingface_hub import ResolvedRevision
from transformers.modeling_utils import LoadStateDictConfig
model, download = make_base(), OPTIONS
model.load_adapter("someone/adapter", load_config=LoadStateDictConfig(download_kwargs=download))
tokens = torch.arange(1, 9)[None]
assert torch.equal(model(tokens).logits, make("tiles").eval()(tokens).logits)
"""
REFUSE = """
for load in (lambda base: PeftModel.from_pretrained(base, "someone/adapter"),
             lambda base: base.load_adapter("someone/adapter")):
    base = make_base()
    try:
        load(base)
    except ValueError as error:
        print(error)
    assert not hasattr(base, "smt_bank")
"""


def test_what_is_pushed_has_its_card_and_comes_back(hub, tmp_path):
    run(PUSH, hub, tmp_path / "home")
    assert set(hub.files) == {WEIGHTS, CONFIG, CARD} and hub.commits == ["main", "later"]
    assert hub.created == [True, False] and hub.messages == ["First", "Upload model"]
    card = hub.files[CARD].decode()
    assert card.count("import smt_peft") == 1 and "library_name: peft" in card and "- mine" in card
    run(LOAD, hub, tmp_path / "another home")


def test_transformers_loads_with_a_revision_of_the_base_model_and_then_from_the_cache(hub, tmp_path):
    """Where it was pointed at an adapter, it has looked up the base's commit, which the adapter's does not know."""
    for file in (WEIGHTS, CONFIG):
        hub.files[file] = (FOLDER / "tiles" / file).read_bytes()
    options = f"{{'revision': ResolvedRevision('{'1' * 40}', repo_id='someone/base')}}"
    run(LOAD_IN_TRANSFORMERS.replace("OPTIONS", options), hub, tmp_path / "home")
    hub.files.clear()
    run(LOAD_IN_TRANSFORMERS.replace("OPTIONS", "{'local_files_only': True}"), hub, tmp_path / "home")


def test_a_card_that_the_repository_has_is_kept(hub, tmp_path):
    hub.files[CARD] = b"---\nlicense: mit\n---\n# By hand\n"
    run('make("tiles").push_to_hub("someone/adapter")', hub, tmp_path)
    card = hub.files[CARD].decode()
    assert "license: mit" in card and "# By hand" in card and card.count("import smt_peft") == 1


def test_a_broken_file_on_the_hub_is_refused_before_the_model_is_wrapped(hub, tmp_path):
    for file in (WEIGHTS, CONFIG):
        hub.files[file] = (FOLDER / "tiles" / file).read_bytes()
    hub.files[WEIGHTS] = hub.files[WEIGHTS][:-100]
    assert run(REFUSE, hub, tmp_path).count("is broken or cut off") == 2
