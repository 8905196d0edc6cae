r"""A Hub on 127.0.0.1, in memory: what the real `huggingface_hub` client asks of one, and faults on demand.

Standard library alone, so that a process can start it before the client is imported: the client reads `HF_ENDPOINT`
and the like at that moment. Repositories of models and of data sets (`datasets/user/name`) with branches, tags, pull
requests, LFS, private ones and tokens.

    hub = start(home)                       # sets HF_ENDPOINT, HF_HOME, … of this process
    hub.fault("GET", r"/resolve/", status=500, times=2)
    hub.fault("PUT", r"/lfs/", cut=100)     # closes the connection after 100 bytes
    hub.fault("HEAD", r"\.safetensors$", headers={"X-Linked-Etag": '"…"'})   # any lie
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl", ".ckpt", ".parquet")
REPO = r"(?P<repo>(?:datasets/)?[\w.-]+/[\w.-]+)"  # of data sets with their prefix, as a part of the name
ROUTES: list[tuple[str, re.Pattern, str]] = []


@dataclass
class Blob:
    """A file's content; its ETag is the sha256 of LFS, or git's own hash."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def facts(self) -> dict:
        out = {"size": len(self.data)}
        if self.lfs:
            out["lfs"] = {"size": len(self.data), "sha256": self.sha256, "oid": self.sha256, "pointerSize": 134}
        return out


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Blob], title: str = "") -> Commit:
        """Adds a commit with these files and moves `ref` to it."""
        parent = self.refs.get(ref)
        text = json.dumps([parent, title, len(self.commits), {k: v.etag for k, v in files.items()}], sort_keys=True)
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, files)
        self.commits[made.oid] = made
        self.refs[ref] = made.oid
        return made

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def write(self, ref: str = "main", **files: bytes) -> Commit:
        """A commit by another client: names to contents, None to delete; `__` in a name stands for `/`."""
        tree = dict(self.at(ref).files)
        for name, data in files.items():
            tree.pop(name, None)
            if data is not None:
                tree[name] = Blob(data, name.endswith(LFS_SUFFIXES))
        return self.commit(ref, tree, "behind the client's back")


@dataclass
class Fault:
    method: str
    pattern: str
    times: int = 1
    status: int | None = None
    cut: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: Callable[[bytes], bytes] | None = None
    gate: Callable[[], object] | None = None  # called before the answer: a Hub that is slow


class Refusal(Exception):
    """An answer with an error status: `X-Error-Code` and `X-Error-Message` choose the client's exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


class HubServer(ThreadingHTTPServer):
    """The Hub: `url`, `tokens` (token to user), `repos`, `log` of (method, path, status), `fault(...)`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"  # another host to the client
        self.tokens = {"hf_user": "user", "hf_other": "other"}
        self.reset()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reset(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def fault(self, method: str, pattern: str, **what) -> Fault:
        """The next `times` requests whose path matches meet `status`, a `cut`, a `gate`, or false headers or body."""
        self.faults.append(Fault(method, pattern, **what))
        return self.faults[-1]

    def create(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A repository with these files, as if somebody had pushed them."""
        repo = self.repos[name] = Repository(name, private)
        repo.commit("main", {k: Blob(v, k.endswith(LFS_SUFFIXES)) for k, v in files.items()}, "first")
        return repo

    def handle_error(self, request, client_address) -> None:
        """Clients may close the connection: that is no error here."""


def route(method: str, pattern: str):
    def register(function):
        ROUTES.append((method, re.compile(pattern + "$"), function.__name__))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def answer(self) -> None:
        self.path_only, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.path_only = re.sub("^/api/datasets/", "/api/models/datasets/", self.path_only)
        with self.server.lock:
            matching = (f for f in self.server.faults if f.method == self.command and f.times > 0)
            self.fault = next((f for f in matching if re.search(f.pattern, unquote(self.path_only))), Fault("", ""))
            self.fault.times -= 1
        if self.fault.cut is not None and self.command in ("PUT", "POST"):
            self.rfile.read1(self.fault.cut)  # a body may be shorter
            return self.hang_up()
        self.body = self.read_body()
        if self.fault.gate is not None:
            self.fault.gate()
        try:
            if self.fault.status is not None:
                raise Refusal(self.fault.status, "a fault that was asked for", headers=self.fault.headers)
            for method, pattern, name in ROUTES:
                match = pattern.match(self.path_only)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    return getattr(self, name)(**{k: unquote(v) for k, v in match.groupdict().items()})
            raise Refusal(404, f"this Hub knows no {self.command} {self.path_only}")
        except Refusal as error:
            headers = {"X-Error-Message": str(error), **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.send(error.status, json.dumps({"error": str(error)}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def hang_up(self) -> None:
        self.server.log.append((self.command, self.path, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        if self.fault.status is None:
            headers |= self.fault.headers
            if self.fault.body is not None:
                data = self.fault.body(data)
        if self.fault.cut is None:
            self.server.log.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.fault.cut is not None:
                self.wfile.write(data[: self.fault.cut])
                return self.hang_up()
            self.wfile.write(data)

    def send_json(self, value, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode())

    # ---- users and permissions --------------------------------------------------------------------------------

    def user(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.server.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.tokens.get(given)

    def repository(self, name: str, write: bool = False) -> Repository:
        user, repo = self.user(), self.server.repos.get(name)
        owner = name.removeprefix("datasets/").split("/")[0]
        if repo is None or (repo.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise Refusal(403 if user else 401, f"You have no write access to {name}")
        return repo

    def commit_at(self, name: str, revision: str) -> tuple[Repository, Commit]:
        repo = self.repository(name)
        commit = repo.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if self.user() is None:
            raise Refusal(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.send_json({"type": "user", "name": self.user(), "orgs": [], "auth": auth})

    # ---- repositories ---------------------------------------------------------------------------------------------

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        asked, user = json.loads(self.body), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if not name.startswith(f"{user}/"):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        answer = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repos:
            return self.send_json({"error": "You already created this model repo", **answer}, 409)
        self.server.create(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        self.send_json(answer)

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    @route("GET", f"/api/models/{REPO}")
    def model_info(self, repo: str) -> None:
        self.revision_info(repo, "main")

    @route("GET", f"/api/models/{REPO}/revision/(?P<revision>.+)")
    def revision_info(self, repo: str, revision: str) -> None:
        found, commit = self.commit_at(repo, revision)
        blobs = "blobs" in self.query
        files = [
            {"rfilename": k} | ({"blobId": v.git_oid, **v.facts()} if blobs else {}) for k, v in commit.files.items()
        ]
        date = "2026-01-01T00:00:00.000Z"
        self.send_json(
            {
                "_id": "0",
                "id": repo.removeprefix("datasets/"),
                "modelId": repo,
                "sha": commit.oid,
                "private": found.private,
                "siblings": files,
            }
            | {"lastModified": date, "createdAt": date, "tags": [], "downloads": 0, "likes": 0, "gated": False}
        )

    @route("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)/?(?P<under>.*)")
    def tree(self, repo: str, revision: str, under: str) -> None:
        commit = self.commit_at(repo, revision)[1]
        prefix = f"{under.rstrip('/')}/" if under else ""
        files = {k: v for k, v in commit.files.items() if k.startswith(prefix)}
        if under and not files:
            raise Refusal(404, f"{under} does not exist", "EntryNotFound")
        names = {str(parent) for k in files for parent in PurePosixPath(k).parents if str(parent).startswith(prefix)}
        folders = sorted(names - {".", prefix.rstrip("/")})
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            files = {k: v for k, v in files.items() if "/" not in k[len(prefix) :]}
            folders = [name for name in folders if "/" not in name[len(prefix) :]]
        out = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in folders]
        self.send_json(out + [{"type": "file", "oid": v.git_oid, "path": k, **v.facts()} for k, v in files.items()])

    @route("POST", f"/api/models/{REPO}/paths-info/(?P<revision>.+)")
    def paths_info(self, repo: str, revision: str) -> None:
        files, out = self.commit_at(repo, revision)[1].files, []
        for path in parse_qs(self.body.decode()).get("paths", []):
            if path in files:
                out.append({"type": "file", "oid": files[path].git_oid, "path": path, **files[path].facts()})
            elif any(name.startswith(f"{path}/") for name in files):
                out.append({"type": "directory", "oid": "0" * 40, "path": path})
        self.send_json(out)

    @route("GET", f"/api/models/{REPO}/refs")
    def refs(self, repo: str) -> None:
        refs = self.repository(repo).refs.items()
        heads = [(k, v) for k, v in refs if not k.startswith("refs/")]
        pulls = [(k, v) for k, v in refs if k.startswith("refs/pr/")]
        branches = [{"name": k, "ref": f"refs/heads/{k}", "targetCommit": v} for k, v in heads]
        requests = [{"name": k, "ref": k, "targetCommit": v} for k, v in pulls]
        self.send_json({"branches": branches, "tags": [], "converts": [], "pullRequests": requests})

    @route("GET", f"/api/models/{REPO}/commits/(?P<revision>.+)")
    def commits(self, repo: str, revision: str) -> None:
        found, commit = self.commit_at(repo, revision)
        out = []
        while commit is not None:
            out.append({"id": commit.oid, "title": commit.title, "message": "", "authors": []})
            out[-1]["date"] = "2026-01-01T00:00:00.000Z"
            commit = found.commits.get(commit.parent)
        self.send_json(out)

    @route("POST", f"/api/models/{REPO}/(?P<kind>branch|tag)/(?P<name>.+)")
    def new_ref(self, repo: str, kind: str, name: str) -> None:
        found, asked = self.repository(repo, write=True), json.loads(self.body or b"{}")
        start, new = (asked.get("startingPoint") or "main", name) if kind == "branch" else (name, asked["tag"])
        if new in found.refs:
            raise Refusal(409, f"Reference {new} exists already")
        found.refs[new] = self.commit_at(repo, start)[1].oid
        self.send_json({})

    # ---- upload ---------------------------------------------------------------------------------------------------

    @route("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)")
    def preupload(self, repo: str, revision: str) -> None:
        self.repository(repo, write=True)
        present, out = self.commit_at(repo, revision)[1].files, []
        for file in json.loads(self.body)["files"]:
            path, blob = file["path"], present.get(file["path"])
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] > 10_000_000
            out.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            out[-1]["oid"] = blob.etag if blob else None
        self.send_json({"files": out})

    @route("POST", f"/{REPO}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> None:
        self.repository(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"], "authenticated": True})
            if wanted["oid"] not in self.server.lfs:
                objects[-1]["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}}
        self.send_json({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The object is not what its name says")
        self.server.lfs[oid] = self.body
        self.send_json({})

    @route("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)")
    def new_commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        with self.server.lock:
            found, base = self.repository(repo, write=True), self.commit_at(repo, revision)[1]
            files, header = dict(base.files), {}
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "header":
                    header = value
                    if value.get("parentCommit") not in (None, base.oid):
                        raise Refusal(412, "The parent commit is not the head: somebody else has pushed")
                elif key == "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
                elif key == "lfsFile":
                    if value["oid"] not in self.server.lfs:
                        raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
                    files[value["path"]] = Blob(self.server.lfs[value["oid"]], lfs=True)
                else:
                    prefix = value["path"] if key == "deletedFile" else value["path"].rstrip("/") + "/"
                    files = {k: v for k, v in files.items() if k != prefix and not k.startswith(prefix)}
            ref, answer = revision, {"success": True}
            if "create_pr" in self.query:
                number = 1 + sum(k.startswith("refs/pr/") for k in found.refs)
                ref = f"refs/pr/{number}"
                found.refs[ref] = base.oid
                answer["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
            made = found.commit(ref, files, header.get("summary", ""))
        self.send_json(answer | {"commitOid": made.oid, "commitUrl": f"{self.server.url}/{repo}/commit/{made.oid}"})

    # ---- download -------------------------------------------------------------------------------------------------

    @route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self.commit_at(repo, revision)[1]
        if path not in commit.files:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:  # these come from elsewhere, without a token
            self.server.lfs[blob.sha256] = blob.data
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
            return self.send(302, b"", headers | {"Location": f"{self.server.cdn}/cdn/{blob.sha256}"})
        self.send_range(blob.data, headers)

    @route("GET", "/cdn/(?P<oid>[0-9a-f]{64})")
    def cdn(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "the token was sent to another host")
        self.send_range(self.server.lfs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def send_range(self, data: bytes, headers: dict[str, str]) -> None:
        headers["Content-Type"] = "application/octet-stream"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.send(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            return self.send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        self.send(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})


HUB: HubServer | None = None


def environment(hub: HubServer, home: str | Path) -> dict[str, str]:
    """What a client's process needs in its environment to talk to this Hub; an empty text is for what must not be."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")  # any of them silences the client
    others = ("HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy")
    return dict.fromkeys([*offline, *others], "") | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


def start(home: str | Path) -> HubServer:
    """Starts the Hub of this process and points the client to it, which must not have been imported yet."""
    global HUB
    HUB = HubServer()
    for name, value in environment(HUB, home).items():
        os.environ.pop(name, None)
        if value:
            os.environ[name] = value
    return HUB
