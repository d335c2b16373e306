"""A stand-in for the Hugging Face Hub on 127.0.0.1, for tests with the real client.

It keeps model repositories in memory and speaks the plain LFS protocol: start the client with `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


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


@dataclass
class Repo:
    """Commits, branches and tags of one repository, and the LFS objects that were uploaded to it."""

    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    tag_messages: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    private: bool = False

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        content = json.dumps([parent, title, len(self.commits), {path: blob.oid for path, blob in files.items()}])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def resolve(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]


class HubError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str, message: str, more: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.body = json.dumps({"error": message, **(more or {})}).encode()


class HubServer:
    """
    Context manager that serves the stand-in from a thread.

    Args:
        token (`str`, *optional*):
            When given, every write and `whoami` need `Authorization: Bearer <token>` and answer 401 without it.

    `repos`, `requests` (a counter of `"METHOD path"`), `lfs_bytes` and `commits` (uploaded so far, the initial commit
    of a repository not counted) may be read at any time. `after_commit`, when set, is called with the repository after
    each commit: somebody else's push that comes right behind.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.requests: Counter[str] = Counter()
        self.lfs_bytes = 0
        self.commits = 0
        self.after_commit: Callable[[Repo], object] | None = None
        self.lock = threading.RLock()
        self._faults: list[list[Any]] = []
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

    def fail_next(self, method: str, path_substring: str, status: int, times: int = 1) -> None:
        """Answer the next `times` matching requests with `status`, or drop their connection when it is 0."""
        self._faults.append([method, path_substring, status, times])

    def take_fault(self, method: str, path: str) -> int | None:
        for fault in self._faults:
            if fault[0] == method and fault[1] in path and fault[3] > 0:
                fault[3] -= 1
                return fault[2]
        return None

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise HubError(404, "RepoNotFound", f"Repository not found: {repo_id}")
        return self.repos[repo_id]

    # One method per route: it takes the groups of its pattern and the body, and returns what becomes the JSON answer.

    def whoami(self, body: bytes) -> dict[str, Any]:
        return {"type": "user", "name": "tester", "fullname": "tester", "orgs": [], "auth": {"type": "access_token"}}

    def validate_yaml(self, body: bytes) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def create_repo(self, body: bytes) -> dict[str, Any]:
        query = json.loads(body)
        repo_id = f"{query.get('organization') or 'tester'}/{query['name']}"
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
        self.repo(repo_id).lfs[oid] = body
        self.lfs_bytes += len(body)
        return {}

    def lfs_verify(self, repo_id: str, oid: str, body: bytes) -> dict[str, Any]:
        if oid not in self.repo(repo_id).lfs:
            raise HubError(404, "", "this object was not uploaded")
        return {}

    def create_commit(self, repo_id: str, branch: str, body: bytes) -> dict[str, Any]:
        repo = self.repo(repo_id)
        head = repo.resolve(branch)
        files, title = dict(head.files), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
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
        commit = repo.commit(branch, title, files)
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
            answer.append({"id": commit.oid, "title": commit.title, "message": "", "authors": author, "date": DATE})
            commit = repo.commits[commit.parent] if commit.parent else None
        return answer

    def info(self, repo_id: str, revision: str | None, body: bytes) -> dict[str, Any]:
        repo = self.repo(repo_id)
        commit = repo.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": repo_id, "sha": commit.oid, "siblings": siblings, "private": repo.private, "tags": []}

    def tree(self, repo_id: str, revision: str, folder: str | None, body: bytes) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        present = self.repo(repo_id).resolve(revision).files
        files = {path: blob for path, blob in present.items() if path.startswith(prefix)}
        if folder and not files:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        answer = []
        for path, blob in files.items():
            entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 130}
            answer.append(entry)
        return answer


_REPO = r"([\w.-]+/[\w.-]+)"
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
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", HubServer.tree, False),
    ("GET", rf"/api/models/{_REPO}(?:/revision/([^/]+))?", HubServer.info, False),
]
RESOLVE = re.compile(rf"/{_REPO}/resolve/([^/]+)/(.+)")


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
            self.hub.requests[f"{self.command} {path}"] += 1
            fault = self.hub.take_fault(self.command, path)
            if fault == 0:
                self.close_connection = True
                return
            try:
                if fault is not None:
                    raise HubError(fault, "", "injected fault")
                self.answer(path, body)
            except HubError as error:
                self.send(error.status, error.body, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def answer(self, path: str, body: bytes) -> None:
        if (match := RESOLVE.fullmatch(path)) and self.command in ("GET", "HEAD"):
            repo_id, revision, name = map(unquote, match.groups())
            commit = self.hub.repo(repo_id).resolve(revision)
            # The client reads the commit of a missing file too, to remember that it is missing there.
            headers = {"X-Repo-Commit": commit.oid}
            if name not in commit.files:
                message = f"{name} does not exist"
                headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
                return self.send(404, message.encode(), headers)
            return self.send(200, commit.files[name].data, {**headers, "ETag": f'"{commit.files[name].oid}"'})
        for method, pattern, route, is_write in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                if is_write and self.hub.token and self.headers["Authorization"] != f"Bearer {self.hub.token}":
                    raise HubError(401, "", "Invalid credentials in Authorization header")
                groups = [group and unquote(group) for group in match.groups()]
                answer = json.dumps(route(self.hub, *groups, body)).encode()
                return self.send(200, answer, {"Content-Type": "application/json"})
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
