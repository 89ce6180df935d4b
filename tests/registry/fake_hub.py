"""A Hub of one process: the part of its API that ``huggingface_hub`` uses to make, fill and read a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, OWNER = "hf_rightfortests", "me"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.commits}".encode()).hexdigest()


@dataclass
class FakeHub:
    """What the server holds, and what came in."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """What came by Git LFS, by sha256."""


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def say(self, status: int, value: Any = None, **headers: str) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, words: str, code: str = "") -> None:
            self.say(status, {"error": words}, X_Error_Code=code, X_Error_Message=words)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def user(self) -> str | None:
            """Who asks; an answer was sent where the token is wrong."""
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token == TOKEN:
                return OWNER
            self.refuse(401, "Invalid username or password.")
            return None

        def repository(self, name: str) -> Repository | None:
            found = hub.repositories.get(name)
            if found is None or (found.private and not name.startswith(f"{OWNER}/")):
                self.refuse(404, "Repository not found", "RepoNotFound")
                return None
            return found

        def do_POST(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self.body()
            if path == "/api/validate-yaml":
                matter = json.loads(body)["content"].split("---")[1]
                self.say(200, {"errors": [], "warnings": [] if yaml.safe_load(matter) else [{"message": "empty"}]})
                return
            if self.user() is None:
                return
            if path == "/api/repos/create":
                self.create(json.loads(body))
                return
            name = path.removeprefix("/api/models/").removeprefix("/").split(".git/")[0]
            name = "/".join(name.split("/")[:2])
            if not name.startswith(f"{OWNER}/"):
                self.refuse(403, "You don't have the rights for this repository")
                return
            found = self.repository(name)
            if found is None:
                return
            if "/preupload/" in path:
                files = json.loads(body)["files"]
                self.say(200, {"files": [
                    {"path": one["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular"}
                    for one in files
                ]})  # fmt: skip
            elif path.endswith("/objects/batch"):
                objects = json.loads(body)["objects"]
                self.say(200, {"transfer": "basic", "objects": [
                    one | {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}} for one in objects
                ]})  # fmt: skip
            elif "/commit/" in path:
                self.commit(found, name, [json.loads(line) for line in body.decode().splitlines()])
            else:
                self.refuse(500, f"not built: {path}")

        def create(self, asked: dict[str, Any]) -> None:
            name = f"{asked.get('organization') or OWNER}/{asked['name']}"
            if not name.startswith(f"{OWNER}/"):
                self.refuse(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
            elif name in hub.repositories:
                self.say(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            else:
                private = asked.get("private", asked.get("visibility") == "private")
                hub.repositories[name] = Repository(private, {".gitattributes": b"*.safetensors filter=lfs\n"})
                self.say(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})

        def commit(self, found: Repository, name: str, lines: list[dict[str, Any]]) -> None:
            head = lines[0]["value"]
            if head.get("parentCommit") not in (None, found.sha):
                self.refuse(412, "A commit has happened since")
                return
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    found.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    found.files[value["path"]] = hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del found.files[value["path"]]
            found.commits += 1
            self.say(200, {"success": True, "commitOid": found.sha, "commitUrl": f"{hub.url}/{name}/commit/{found.sha}"})

        def do_PUT(self) -> None:
            body = self.body()
            oid = hashlib.sha256(body).hexdigest()
            assert self.path == f"/lfs/{oid}"
            hub.objects[oid] = body
            self.say(200, b"")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if self.user() is None:
                return
            if path.startswith("/api/models/"):
                name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
                if (found := self.repository(name)) is None:
                    return
                if revision not in ("", "main", found.sha):
                    self.refuse(404, "Invalid rev id", "RevisionNotFound")
                    return
                siblings = [{"rfilename": file} for file in sorted(found.files)]
                self.say(200, {"id": name, "sha": found.sha, "private": found.private, "siblings": siblings, "tags": []})
                return
            name, _, rest = path.lstrip("/").partition("/resolve/")
            if (found := self.repository(name)) is None:
                return
            content = found.files.get(rest.partition("/")[2])
            if content is None:
                self.refuse(404, "Entry not found", "EntryNotFound")
                return
            etag = hashlib.sha256(content).hexdigest()
            self.say(200, content, ETag=f'"{etag}"', X_Repo_Commit=found.sha, Accept_Ranges="bytes")

        do_HEAD = do_GET

        def log_message(self, *_words: Any) -> None:
            """Nothing on standard error."""

    return Handler


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A Hub at a port of this machine."""
    hub = FakeHub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
