"""A stand-in for the Hugging Face Hub on 127.0.0.1, for tests with the real client.

It keeps model repositories in memory, which can be read as datasets too, and speaks the plain LFS protocol: start the
client with `HF_HUB_DISABLE_XET=1`.
It can be made to fail the way a real one does: error answers, answers that get lost, slow connections, rival commits.
"""

import base64
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Blob:
    """One version of one file."""

    data: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        """What the Hub calls the file's oid: the sha256 of an LFS file, the git blob hash of any other."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]
    message: str = ""


@dataclass
class Repo:
    """Commits, branches and tags of one repository, and the LFS objects that were uploaded to it."""

    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    tag_messages: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    private: bool = False

    def commit(self, branch: str, title: str, files: dict[str, Blob], message: str = "") -> Commit:
        parent = self.branches.get(branch)
        content = json.dumps([parent, title, len(self.commits), {path: blob.oid for path, blob in files.items()}])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files, message)
        self.branches[branch] = oid
        return self.commits[oid]

    def resolve(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]


class HubError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        more: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self.body = json.dumps({"error": message, **(more or {})}).encode()


@dataclass
class Fault:
    """What happens to the next `times` requests that match, beginning with the one after `skip`."""

    method: str
    path: str
    status: int | None = None  # 0 drops the connection
    times: int = 1
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # to wait before the answer, so that the client has to
    after: bool = False  # do the work first: the answer is lost, not the request
    kill: bool = False  # the client's process, `HubServer.victim`, dies at this instant


class HubServer:
    """
    Context manager that serves the stand-in from a thread.

    Args:
        token (`str`, *optional*):
            When given, every write and `whoami` need `Authorization: Bearer <token>` and answer 401 without it, and
            so does reading a private repository.
        reader (`str`, *optional*):
            A token that may read everything and write nothing.

    To be read at any time: `repos`; counters of `requests` (by `"METHOD path"`), of `faults` that hit, of bytes
    `received` of each LFS object (by its sha256) and of those `resent` though a commit had the object already;
    `lfs_bytes`, the sum of what was received; `commits` (the initial commit of a repository not counted).

    To be set: `before_commit` and `after_commit` are called with the repository around each commit (somebody else's
    push that comes just before, or right behind), `on_request` before each request; `foreign` names owners whose
    repositories nobody here may create or write; `victim` is the process that a fault with `kill` ends.
    """

    def __init__(self, token: str | None = None, reader: str | None = None) -> None:
        self.token = token
        self.reader = reader
        self.repos: dict[str, Repo] = {}
        self.foreign: set[str] = set()
        self.victim: int | None = None
        self.requests: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.resent: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.commits = 0
        self.on_request: Callable[[], object] | None = None
        self.before_commit: Callable[[Repo], object] | None = None
        self.after_commit: Callable[[Repo], object] | None = None
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def lfs_bytes(self) -> int:
        return sum(self.received.values())

    def fail_next(self, method: str, path_substring: str, status: int | None, times: int = 1, **more: Any) -> None:
        """Answer the next `times` matching requests with `status`, or drop their connection when it is 0.

        `more` are the other fields of [`Fault`]; with `status=None` the request is answered as usual, `seconds` late.
        """
        self._faults.append(Fault(method, path_substring, status, times, **more))

    def take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self._faults:
            if fault.method == method and fault.path in path and fault.times > 0:
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                self.faults[f"{method} {fault.path} {'slow' if fault.status is None else fault.status}"] += 1
                return fault
        return None

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise HubError(404, "RepoNotFound", f"Repository not found: {repo_id}")
        return self.repos[repo_id]

    # One method per route: it takes the groups of its pattern and the body, and returns what becomes the JSON answer.

    def whoami(self, body: bytes) -> dict[str, Any]:
        return {"type": "user", "name": "tester", "fullname": "tester", "orgs": [], "auth": {"type": "access_token"}}

    def validate_yaml(self, body: bytes) -> dict[str, Any]:
        """The front matter must be a mapping, and its tags texts."""
        data = front_matter(json.loads(body)["content"].encode())
        tags = data.get("tags", []) if isinstance(data, dict) else [None]
        if not all(isinstance(tag, str) for tag in tags):
            errors = [{"message": '"tags" must be an array of strings'}]
            raise HubError(400, "", "Invalid metadata in README.md", {"errors": errors, "warnings": []})
        return {"errors": [], "warnings": []}

    def create_repo(self, body: bytes) -> dict[str, Any]:
        query = json.loads(body)
        repo_id = f"{query.get('organization') or 'tester'}/{query['name']}"
        if repo_id.split("/")[0] in self.foreign:
            raise HubError(403, "", f"You don't have the rights to create a model under the namespace of {repo_id}")
        url = f"{self.endpoint}/{repo_id}"
        if repo_id in self.repos:
            # The client takes the address from the refusal too.
            raise HubError(409, "", f"You already created this model repo: {repo_id}", {"url": url})
        self.repos[repo_id] = Repo(private=query.get("visibility") == "private")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.repos[repo_id].commit("main", "initial commit", {".gitattributes": Blob(attributes.encode())})
        return {"url": url, "id": repo_id, "name": repo_id}

    def preupload(self, repo_id: str, revision: str, body: bytes) -> dict[str, Any]:
        present = self.repo(repo_id).resolve(revision).files
        answer = []
        for entry in json.loads(body)["files"]:
            path = entry["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) or entry["size"] > 10_000_000 else "regular"
            oid = present[path].oid if path in present else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_batch(self, repo_id: str, body: bytes) -> dict[str, Any]:
        repo = self.repo(repo_id)
        objects = []
        for entry in json.loads(body)["objects"]:
            href = f"{self.endpoint}/lfs/{repo_id}/{entry['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry if entry["oid"] in repo.lfs else {**entry, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, repo_id: str, oid: str, body: bytes) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "", "the bytes do not have this sha256")
        repo = self.repo(repo_id)
        if any(blob.lfs and blob.oid == oid for commit in repo.commits.values() for blob in commit.files.values()):
            self.resent[oid] += len(body)
        repo.lfs[oid] = body
        self.received[oid] += len(body)
        return {}

    def lfs_verify(self, repo_id: str, oid: str, body: bytes) -> dict[str, Any]:
        if oid not in self.repo(repo_id).lfs:
            raise HubError(404, "", "this object was not uploaded")
        return {}

    def create_commit(self, repo_id: str, branch: str, body: bytes) -> dict[str, Any]:
        repo = self.repo(repo_id)
        if self.before_commit:
            self.before_commit(repo)
        head = repo.resolve(branch)
        files, title, message = dict(head.files), "", ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title, message = value["summary"], value.get("description", "")
                if value.get("parentCommit") not in (None, head.oid):
                    raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
            elif operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if value["oid"] not in repo.lfs:
                    raise HubError(400, "", f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = Blob(repo.lfs[value["oid"]], lfs=True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(branch, title, files, message)
        self.commits += 1
        if self.after_commit:
            self.after_commit(repo)
        url = f"{self.endpoint}/{repo_id}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url}

    def create_branch(self, repo_id: str, branch: str, body: bytes) -> dict[str, Any]:
        repo = self.repo(repo_id)
        if branch in repo.branches:
            raise HubError(409, "", f"Reference already exists: {branch}")
        repo.branches[branch] = repo.resolve(json.loads(body or b"{}").get("startingPoint", "main")).oid
        return {}

    def create_tag(self, repo_id: str, revision: str, body: bytes) -> dict[str, Any]:
        repo, query = self.repo(repo_id), json.loads(body)
        if query["tag"] in repo.tags:
            raise HubError(409, "", f"Tag reference exists already: {query['tag']}")
        repo.tags[query["tag"]] = repo.resolve(revision).oid
        repo.tag_messages[query["tag"]] = query.get("message", "")
        return {}

    def delete_tag(self, repo_id: str, tag: str, body: bytes) -> dict[str, Any]:
        if self.repo(repo_id).tags.pop(tag, None) is None:
            raise HubError(404, "RevisionNotFound", f"Tag not found: {tag}")
        return {}

    def refs(self, repo_id: str, body: bytes) -> dict[str, Any]:
        def listing(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        repo = self.repo(repo_id)
        return {"branches": listing("heads", repo.branches), "tags": listing("tags", repo.tags), "converts": []}

    def history(self, repo_id: str, revision: str, body: bytes) -> list[dict[str, Any]]:
        repo = self.repo(repo_id)
        commit: Commit | None = repo.resolve(revision)
        answer = []
        while commit is not None:
            author = [{"user": "tester"}]
            what = {"id": commit.oid, "title": commit.title, "message": commit.message}
            answer.append({**what, "authors": author, "date": DATE})
            commit = repo.commits[commit.parent] if commit.parent else None
        return answer

    def info(self, repo_id: str, revision: str | None, body: bytes) -> dict[str, Any]:
        repo = self.repo(repo_id)
        commit = repo.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        answer = {"id": repo_id, "sha": commit.oid, "siblings": siblings, "private": repo.private, "tags": []}
        if "README.md" in commit.files:
            answer["cardData"] = front_matter(commit.files["README.md"].data)
        return answer

    def tree(self, repo_id: str, revision: str, folder: str | None, body: bytes) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        present = self.repo(repo_id).resolve(revision).files
        files = {path: blob for path, blob in present.items() if path.startswith(prefix)}
        if folder and not files:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return [_entry(path, blob) for path, blob in files.items()]

    def paths_info(self, repo_id: str, revision: str, body: bytes) -> list[dict[str, Any]]:
        present = self.repo(repo_id).resolve(revision).files
        return [_entry(path, present[path]) for path in parse_qs(body.decode())["paths"] if path in present]


def front_matter(card: bytes) -> Any:
    """What stands between the first two lines of dashes of a card."""
    match = re.match(r"---\n(.*?)\n---\n", card.decode(), re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 130}
    return entry


_REPO = r"([\w.-]+/[\w.-]+)"
_READ = rf"/api/(?:models|datasets)/{_REPO}"
# (methods, pattern of the path before unquoting, method of the server, is a write)
ROUTES = [
    ("GET", r"/api/whoami-v2", HubServer.whoami, True),
    ("POST", r"/api/validate-yaml", HubServer.validate_yaml, False),
    ("POST", r"/api/repos/create", HubServer.create_repo, True),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", HubServer.preupload, True),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", HubServer.lfs_batch, True),
    ("PUT", rf"/lfs/{_REPO}/(\w+)", HubServer.lfs_put, False),
    ("POST", rf"/lfs/{_REPO}/(\w+)/verify", HubServer.lfs_verify, True),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", HubServer.create_commit, True),
    ("POST", rf"/api/models/{_REPO}/branch/([^/]+)", HubServer.create_branch, True),
    ("POST", rf"/api/models/{_REPO}/tag/([^/]+)", HubServer.create_tag, True),
    ("DELETE", rf"/api/models/{_REPO}/tag/([^/]+)", HubServer.delete_tag, True),
    ("GET", rf"/api/models/{_REPO}/refs", HubServer.refs, False),
    ("GET", rf"/api/models/{_REPO}/commits/([^/]+)", HubServer.history, False),
    ("GET", rf"{_READ}/tree/([^/]+)(?:/(.+))?", HubServer.tree, False),
    ("POST", rf"/api/models/{_REPO}/paths-info/([^/]+)", HubServer.paths_info, False),
    ("GET", rf"{_READ}(?:/revision/([^/]+))?", HubServer.info, False),
]
RESOLVE = re.compile(rf"(?:/datasets)?/{_REPO}/resolve/([^/]+)/(.+)")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: without this each answer waits for a delayed acknowledgement.
    disable_nagle_algorithm = True

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        # A client that exits drops its connections.
        with suppress(ConnectionError):
            super().handle()

    def handle_request(self) -> None:
        body = self.read_body()
        path = urlsplit(self.path).path
        with self.hub.lock:
            if self.hub.on_request:
                self.hub.on_request()
            self.hub.requests[f"{self.command} {path}"] += 1
            fault = self.hub.take_fault(self.command, path)
        if fault is not None and fault.seconds:
            time.sleep(fault.seconds)
        try:
            if fault is None or fault.status is None or fault.after:
                with self.hub.lock:
                    answer = self.answer(path, body)
        except HubError as error:
            answer = error.status, error.body, error.headers
        if fault is not None and fault.kill:
            try:
                os.kill(self.hub.victim, signal.SIGKILL)
            except ProcessLookupError:
                # The dead process had sent this request too, on another connection: the next process is meant.
                with self.hub.lock:
                    fault.times += 1
        if fault is not None and fault.status == 0:
            self.close_connection = True
        elif fault is not None and fault.status is not None:
            error = HubError(fault.status, "", "injected fault", headers=fault.headers)
            self.send(error.status, error.body, error.headers)
        else:
            self.send(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def answer(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        bearer = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        known = self.hub.token is None or bearer in (self.hub.token, self.hub.reader)
        named = re.match(rf"(?:/api/models)?/{_REPO}", path)
        if named and not known and (repo := self.hub.repos.get(named[1])) and repo.private:
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        if (match := RESOLVE.fullmatch(path)) and self.command in ("GET", "HEAD"):
            repo_id, revision, name = map(unquote, match.groups())
            commit = self.hub.repo(repo_id).resolve(revision)
            # The client reads the commit of a missing file too, to remember that it is missing there.
            headers = {"X-Repo-Commit": commit.oid}
            if name not in commit.files:
                message = f"{name} does not exist"
                headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
                return 404, message.encode(), headers
            return 200, commit.files[name].data, {**headers, "ETag": f'"{commit.files[name].oid}"'}
        for method, pattern, route, is_write in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                if is_write and not known:
                    raise HubError(401, "", "Invalid credentials in Authorization header")
                groups = [group and unquote(group) for group in match.groups()]
                foreign = named is not None and named[1].split("/")[0] in self.hub.foreign
                if is_write and route is not HubServer.whoami and (foreign or bearer == self.hub.reader):
                    raise HubError(403, "", "Forbidden: you need write access to this repository")
                answer = json.dumps(route(self.hub, *groups, body)).encode()
                return 200, answer, {"Content-Type": "application/json"}
        raise HubError(404, "", f"no such route: {self.command} {path}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def connect(server: HubServer, monkeypatch: Any, cache: Any, token: str | None = "hf_right") -> None:
    """Point the real client of this process to the stand-in; what it reads once, at import, is set anew.

    Args:
        server (`HubServer`): Running.
        monkeypatch (`pytest.MonkeyPatch`): Undoes it.
        cache (`Path`): Folder for what is downloaded.
        token (`str`, *optional*): The user's; none at all with `None`.
    """
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
    if "transformers.utils.hub" in sys.modules:
        monkeypatch.setattr(sys.modules["transformers.utils.hub"], "_hf_api", None)
    settings = {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache) + "/no-token",
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
