"""A small Hub on this machine, in memory: what huggingface_hub asks of the real one for a pull and for a push.

As on the real Hub, everybody may ask what files a gated repository has, and its files are refused; weights are "LFS"
files, known by their SHA-256, all others are known by their git hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

MAIN = "main"
ID = r"(?P<id>[\w.-]+(?:/[\w.-]+)??)"
API = rf"/api/(?P<kind>models|datasets)/{ID}"
RESOLVE = rf"/(?P<datasets>datasets/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
LFS_ENDINGS = (".safetensors", ".parquet")


class Refusal(Exception):
    """An answer that is an error: its status and, where the real Hub sends one, its error code."""

    def __init__(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(status, code)
        self.status, self.code, self.headers = status, code, headers or {}


@dataclass
class Fault:
    """What goes wrong with some requests: they are refused, or the connection is dropped when part of them was read.

    `request` matches "METHOD /path"; `times` of them fail, after which all is well.
    """

    request: str
    refusal: Refusal | None = None
    times: int = 1


@dataclass
class Repository:
    """One repository: its commits, and the branches and tags that name some of them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str) -> str:
        """Put a set of files at the head of a branch; the commit's hash."""
        facts = [len(self.commits), branch, sorted((name, digest(name, data)) for name, data in files.items())]
        sha = hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha

    def find(self, revision: str) -> str:
        """The commit that a branch, tag or hash names."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound")
        return sha


class FakeHub:
    """The server. `served` counts the bytes sent per file ("org/name/path"), `asked` lists all requests."""

    def __init__(self) -> None:
        self.clear()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.start()

    def clear(self) -> None:
        """Forget all repositories and counts."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploaded: dict[str, bytes] = {}
        self.served: Counter[str] = Counter()
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.refused: set[str] = set()
        """Files ("org/name/path") that are refused as a whole; parts of them are served."""
        self.messages: list[str] = []
        """Of the commits that were made by requests."""
        self.read_only = False
        """Whether the token may not write."""
        self.faults: list[Fault] = []
        """What goes wrong with the next requests."""

    @property
    def endpoint(self) -> str:
        """The address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Answer requests; after `stop` again at the same address."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), _handler_of(self))
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def publish(self, id: str, folder: Path, revision: str = MAIN, kind: str = "models") -> str:
        """Put a folder's files into a repository; the commit's hash."""
        repository = self.repositories.setdefault((kind, id), Repository())
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        sha = repository.commit(files, revision)
        repository.refs.setdefault(MAIN, sha)
        return sha

    def files(self, id: str, revision: str = MAIN, kind: str = "models") -> dict[str, bytes]:
        """The files of a repository by path."""
        repository = self.repositories[kind, id]
        return repository.commits[repository.find(revision)]

    def forget_traffic(self) -> None:
        """Count from zero."""
        self.served.clear()
        self.asked.clear()

    # -- answers: each gets what the address matched and the request's body, and gives (body, headers) -----------------

    def info(self, kind: str, id: str, revision: str | None = None) -> dict[str, Any]:
        """What a repository is and holds."""
        repository = self._find(kind, id)
        sha = repository.find(unquote(revision or MAIN))
        siblings = [{"rfilename": name} for name in sorted(repository.commits[sha])]
        gated = "manual" if repository.gated else False
        return {"id": id, "sha": sha, "siblings": siblings, "private": repository.private, "gated": gated, "tags": []}

    def tree(self, kind: str, id: str, revision: str, path: str | None, recursive: bool) -> list[dict[str, Any]]:
        """The files of a folder with sizes and hashes: all inside it, or its own and the names of its folders."""
        repository = self._find(kind, id)
        files = repository.commits[repository.find(unquote(revision))]
        prefix = f"{unquote(path)}/" if path else ""
        inside = {name: data for name, data in sorted(files.items()) if name.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, "EntryNotFound")
        entries: dict[str, dict[str, Any]] = {}
        for name, data in inside.items():
            own, deeper, _ = name.removeprefix(prefix).partition("/")
            if deeper and not recursive:
                folder = prefix + own
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": digest(folder, b"")}
                continue
            entries[name] = {"type": "file", "path": name, "size": len(data), "oid": digest(name, data)}
            if is_lfs(name):
                entries[name]["lfs"] = {"oid": digest(name, data), "size": len(data), "pointerSize": 130}
        return list(entries.values())

    def file(self, kind: str, id: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        """One file's bytes, and the headers that go with them."""
        repository = self._find(kind, id)
        sha = repository.find(unquote(revision))
        commit = {"X-Repo-Commit": sha}
        if repository.gated:
            raise Refusal(403, "GatedRepo", commit)
        if path not in repository.commits[sha]:
            raise Refusal(404, "EntryNotFound", commit)
        data = repository.commits[sha][path]
        headers = {**commit, "ETag": f'"{digest(path, data)}"', "Accept-Ranges": "bytes"}
        if is_lfs(path):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        return data, headers

    def create(self, body: dict[str, Any]) -> dict[str, str]:
        """Make a repository."""
        kind, id = f"{body.get('type') or 'model'}s", "/".join(filter(None, (body["organization"], body["name"])))
        prefix = "" if kind == "models" else f"{kind}/"
        address = {"url": f"{self.endpoint}/{prefix}{id}"}
        if (kind, id) in self.repositories:
            raise Refusal(409, json.dumps(address))
        repository = Repository(private=body.get("visibility") == "private")
        repository.commit({".gitattributes": b""}, MAIN)
        self.repositories[kind, id] = repository
        return address

    def branch(self, kind: str, id: str, revision: str, body: dict[str, Any]) -> dict[str, str]:
        """Make a branch."""
        repository = self._find(kind, id)
        if unquote(revision) in repository.refs:
            raise Refusal(409)
        repository.refs[unquote(revision)] = repository.find(body.get("startingPoint", MAIN))
        return {}

    def preupload(self, kind: str, id: str, revision: str, body: dict[str, Any]) -> dict[str, Any]:
        """Say which files are to be uploaded as LFS objects."""
        self._find(kind, id).find(unquote(revision))
        modes = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if is_lfs(entry["path"]) else "regular",
                "shouldIgnore": False,
            }
            for entry in body["files"]
        ]
        return {"files": modes}

    def batch(self, body: dict[str, Any]) -> dict[str, Any]:
        """Say where LFS objects go."""
        objects = []
        for wanted in body["objects"]:
            place = f"{self.endpoint}/lfs/{wanted['oid']}"
            upload, verify = {"href": place}, {"href": f"{place}/verify"}
            actions = {} if wanted["oid"] in self.uploaded else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**wanted, **actions})
        return {"transfer": "basic", "objects": objects}

    def put(self, oid: str, data: bytes) -> dict[str, str]:
        """Keep an LFS object."""
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400)
        self.uploaded[oid] = data
        return {}

    def verify(self, oid: str, body: dict[str, Any]) -> dict[str, str]:
        """Confirm an LFS object."""
        if len(self.uploaded.get(oid, b"")) != body["size"]:
            raise Refusal(400)
        return {}

    def commit(self, kind: str, id: str, revision: str, lines: bytes, pull: bool = False) -> dict[str, Any]:
        """Make a commit of uploaded files, on a branch or as a pull request."""
        repository, branch = self._find(kind, id), unquote(revision)
        files = dict(repository.commits[repository.find(branch)])
        if pull:
            branch = "refs/pr/1"
        for line in lines.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.uploaded[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "header":
                self.messages.append(value["summary"])
        sha = repository.commit(files, branch)
        prefix = "" if kind == "models" else f"{kind}/"
        place = f"{self.endpoint}/{prefix}{id}"
        asked = {"pullRequestUrl": f"{place}/discussions/1"} if pull else {}
        return {"success": True, "commitOid": sha, "commitUrl": f"{place}/commit/{sha}", **asked}

    def _find(self, kind: str, id: str) -> Repository:
        if (kind, id) not in self.repositories:
            raise Refusal(404, "RepoNotFound")
        return self.repositories[kind, id]


def is_lfs(name: str) -> bool:
    """Whether a file is kept as a large one."""
    return name.endswith(LFS_ENDINGS)


def digest(name: str, data: bytes) -> str:
    """The hash by which the Hub knows a file."""
    if is_lfs(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


Routes = list[tuple[str, str, Callable[[dict[str, Any], bytes, str], Any]]]


def _routes(hub: FakeHub) -> Routes:
    """Method, address and answer of everything but files; an answer gets what the address matched, the request's body
    and its query."""
    return [
        ("GET", rf"{API}(?:/revision/(?P<revision>[^/]+))?", lambda found, *_: hub.info(**found)),
        (
            "GET",
            rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?",
            lambda found, _, query: hub.tree(**found, recursive="recursive=true" in query.lower()),
        ),
        ("POST", "/api/repos/create", lambda _, body, __: hub.create(json.loads(body))),
        ("POST", "/api/validate-yaml", lambda *_: {"warnings": [], "errors": []}),
        (
            "POST",
            rf"{API}/branch/(?P<revision>[^/]+)",
            lambda found, body, _: hub.branch(**found, body=json.loads(body or b"{}")),
        ),
        (
            "POST",
            rf"{API}/preupload/(?P<revision>[^/]+)",
            lambda found, body, _: hub.preupload(**found, body=json.loads(body)),
        ),
        ("POST", r"/.+\.git/info/lfs/objects/batch", lambda _, body, __: hub.batch(json.loads(body))),
        ("PUT", r"/lfs/(?P<oid>\w+)", lambda found, body, _: hub.put(found["oid"], body)),
        ("POST", r"/lfs/(?P<oid>\w+)/verify", lambda found, body, _: hub.verify(found["oid"], json.loads(body))),
        (
            "POST",
            rf"{API}/commit/(?P<revision>[^/]+)",
            lambda found, body, query: hub.commit(**found, lines=body, pull="create_pr=1" in query),
        ),
    ]


def _handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    routes = _routes(hub)

    class Handler(BaseHTTPRequestHandler):
        """Speaks HTTP/1.0, a connection a request, so that a stopped server is really gone."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _answer(self) -> None:
            path, query = urlsplit(self.path)[2:4]
            hub.asked.append(f"{self.command} {path}")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            fault = self._fault(f"{self.command} {path}")
            if fault is not None and fault.refusal is None:
                self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1000))
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            body = self._body()
            try:
                if fault is not None and fault.refusal is not None:
                    raise fault.refusal
                if self.command == "POST" and not token:
                    raise Refusal(401)
                if self.command in ("POST", "PUT") and self.path != "/api/validate-yaml" and hub.read_only:
                    raise Refusal(403)
                if self.command != "PUT":  # LFS objects go to a signed address
                    hub.tokens.add(token)
                if self.command in ("GET", "HEAD") and (found := re.fullmatch(RESOLVE, path)):
                    self._send_file(found)
                    return
                for method, address, answer in routes:
                    if method == self.command and (found := re.fullmatch(address, path)):
                        self._send(200, json.dumps(answer(found.groupdict(), body, query)).encode(), {})
                        return
                raise Refusal(404)
            except Refusal as refusal:
                code = {} if refusal.status == 409 or not refusal.code else {"X-Error-Code": refusal.code}
                said = refusal.code if refusal.status == 409 else json.dumps({"error": refusal.code})
                self._send(refusal.status, said.encode(), {**refusal.headers, **code})

        def _fault(self, request: str) -> Fault | None:
            """What goes wrong with a request."""
            for fault in hub.faults:
                if fault.times and re.fullmatch(fault.request, request):
                    fault.times -= 1
                    return fault
            return None

        def _send_file(self, found: re.Match[str]) -> None:
            kind, path = "datasets" if found["datasets"] else "models", unquote(found["path"])
            data, headers = hub.file(kind, found["id"], found["revision"], path)
            status, part = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not part and f"{found['id']}/{path}" in hub.refused:
                raise Refusal(403)
            if part:
                first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                status, data = 206, data[first : last + 1]
            if self.command == "GET":
                hub.served[f"{found['id']}/{path}"] += len(data)
            self._send(status, data, headers)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler
