"""Talking to the Hugging Face Hub: one release becomes one commit and one tag, however often the push is interrupted.

Everything here may be called again after any failure: what is there already is recognised by its content.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from email.utils import parsedate_to_datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session, parse_ratelimit_headers

from ..errors import UserError
from .cards import validate_card


logger = logging.getLogger(__name__)

TRIES = 6
# Seconds: before the second try (doubled each time), the longest wait of our own, and the longest the Hub may ask for.
FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED = 0.5, 30.0, 600.0
# Seconds that one read or write on a connection may take; the client itself would wait for ever.
TIMEOUT = 120.0
# 412: somebody else committed in between, so the head has to be looked at again.
TRANSIENT = frozenset({408, 412, 425, 429, 500, 502, 503, 504})
# What a repository may hold that is nobody's work: the Hub itself writes these.
BARE_FILES = frozenset({".gitattributes", "README.md", "LICENSE"})
LEDGER_FILE = "hf_pm/ledger.json"
ROLLBACK = "Roll back to"

Answer = TypeVar("Answer")


# ---------------------------------------------------------------------------------------------------------------------
# Failures


def persistently(call: Callable[[], Answer], what: str, sleep: Callable[[float], object] = time.sleep) -> Answer:
    """Make a call that may fail for reasons that pass: a busy or broken Hub, a dropped connection, a lost race.

    Waits as long as the Hub asks for (`Retry-After`, `RateLimit`), otherwise ever longer.

    Args:
        call (`Callable`): Must be safe to repeat, also when it had succeeded and only its answer was lost.
        what (`str`): For the log.
        sleep (`Callable`, *optional*): Waits that many seconds.

    Raises:
        Exception: What the last try raised, or the first error that no waiting can cure.
    """
    for tried in range(1, TRIES + 1):
        _limit_waiting()
        try:
            return call()
        except Exception as error:
            wait = seconds_to_wait(error, tried)
            if wait is None or tried == TRIES:
                raise
            logger.info("%s: %s Trying again in %.1f s.", what, explain(error), wait)
            sleep(wait)
    raise AssertionError("unreachable")


def seconds_to_wait(error: BaseException, tried: int) -> float | None:
    """How long to wait before the next try, `None` if another try cannot help.

    Args:
        error (`BaseException`): What the try raised.
        tried (`int`): Number of tries so far.
    """
    error = _cause(error)
    wait = min(FIRST_WAIT * 2 ** (tried - 1), LONGEST_WAIT)
    if isinstance(error, HfHubHTTPError):
        status, headers = error.response.status_code, error.response.headers
        return min(max(wait, _asked(headers)), LONGEST_ASKED) if status in TRANSIENT else None
    if isinstance(error, OfflineModeIsEnabled) or "xet-write-token" in str(error):
        return None
    # A proxy's error page is no JSON.
    return wait if isinstance(error, httpx2.TransportError | ConnectionError | json.JSONDecodeError) else None


def _asked(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks for, 0 if it asks for none."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    value = headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _cause(error: BaseException) -> BaseException:
    """The client wraps what went wrong with one file into a `RuntimeError`."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def explain(error: BaseException) -> str:
    """One line for a person: what the Hub said, and what can be done where something can."""
    error = _cause(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled):
        return "The client is offline (`HF_HUB_OFFLINE=1`). Unset it to push."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.response.headers.get("X-Error-Message") or text
        remedies = {
            401: "The token is missing, wrong or expired: log in with `hf auth login`, or set `HF_TOKEN`.",
            403: "The token may not write there: use one with write access, or another `hub_model_id`.",
            404: "Correct the name of the repo, or use a token that may see it.",
            429: "The Hub limits the rate of requests.",
        }
        return f"HTTP {status}: {said.rstrip('.')}. {remedies.get(status, '')}".rstrip()
    if "xet-write-token" in text:
        return (
            "The endpoint does not speak Xet, the upload protocol of the Hub client. Set `HF_HUB_DISABLE_XET=1` "
            "before Python starts."
        )
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text.rstrip('.')}."


def _limit_waiting() -> None:
    """Let a stalled connection fail after [`TIMEOUT`] seconds, unless the user's own client has a limit."""
    session = get_session()
    if session.timeout.read is None:
        session.timeout = httpx2.Timeout(TIMEOUT)


# ---------------------------------------------------------------------------------------------------------------------
# Before training


def check_repo(
    repo_id: str, card: str, *, token: str | None, private: bool | None, revision: str | None, owned: "Owned"
) -> str:
    """Make sure that a stream can be pushed, before anything is trained for it.

    Args:
        repo_id (`str`): Where to; created if it does not exist.
        card (`str`): A card with the metadata that the real ones will have.
        token (`str`, *optional*): The client's stored one by default.
        private (`bool`, *optional*): Visibility of a repository that is created.
        revision (`str`, *optional*): Branch; `main` by default.
        owned (`Owned`): What this run has pushed or may push.

    Returns:
        `str`: The full id, `owner/name`.

    Raises:
        UserError: No token, no write access, a bad name, metadata that the Hub refuses, or somebody else's repo.
    """
    if not (token or get_token()):
        raise UserError(
            "`push_to_hub` is on, but there is no token. Log in with `hf auth login`, set `HF_TOKEN`, or train with "
            "`push_to_hub: false`."
        )
    validate_card(card)
    api = HfApi(token=token)

    def check() -> str:
        api.whoami()
        full = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # The way an upload begins; a token that may only read is refused, and nothing is sent.
        probe = CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode())
        api.preupload_lfs_files(full, [probe])
        _check_owner(api, full, revision, owned)
        ModelCard(card).validate(repo_type="model")
        return full

    try:
        return persistently(check, f"Checking {repo_id}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"`push_to_hub` is on, but the repo {repo_id!r} cannot be created or reached: {explain(error)} Or train "
            "with `push_to_hub: false`."
        ) from error


def base_license(model_id: str, revision: str | None, token: str | None) -> dict[str, str]:
    """License of a model on the Hub as its card names it; empty if it does not, or cannot be asked."""
    try:
        data = persistently(lambda: HfApi(token=token).model_info(model_id, revision=revision), model_id).card_data
    except (httpx2.HTTPError, OSError, ValueError) as error:
        reason = explain(error)
        logger.warning("The license of %s is not known: %s Set `license` to have one on the card.", model_id, reason)
        return {}
    names = ("license", "license_name", "license_link")
    return {name: data.get(name) for name in names if data is not None and isinstance(data.get(name), str)}


class Owned:
    """Commits and tags of a repository that this run made.

    Args:
        adapters (`Sequence[str]`): sha256 of the adapter of each committed task, oldest first.
        dropped (`Collection[str]`, *optional*): Those of tasks that were rolled back but may still be on the Hub.
    """

    def __init__(self, adapters: Sequence[str], dropped: Collection[str] = ()) -> None:
        self.adapters = list(adapters)
        self.dropped = set(dropped)

    def covers(self, ledger: Any) -> bool:
        """Whether the ledger of a repository is a beginning of this run's."""
        theirs = [entry["adapter_sha256"] for entry in ledger["entries"]]
        while theirs and theirs[-1] in self.dropped and theirs != self.adapters[: len(theirs)]:
            theirs.pop()
        return theirs == self.adapters[: len(theirs)]


def _check_owner(api: HfApi, repo_id: str, revision: str | None, owned: Owned) -> None:
    """Refuse a repository whose files this run did not write: a push replaces all of them."""
    branches = {branch.name: branch.target_commit for branch in api.list_repo_refs(repo_id).branches}
    head = branches.get(revision or "main")
    if head is None:
        return
    present = {item.path for item in _tree(api, repo_id, head)}
    if present <= BARE_FILES:
        return
    remedy = "Use another `hub_model_id`"
    if LEDGER_FILE not in present:
        raise UserError(f"The repo {repo_id!r} holds another model ({sorted(present - BARE_FILES)[0]}). {remedy}.")
    # By the commit: of a branch the client would rather show an old copy than none.
    path = api.hf_hub_download(repo_id, LEDGER_FILE, revision=head)
    if not owned.covers(json.loads(Path(path).read_text())):
        raise UserError(
            f"The repo {repo_id!r} holds the history of another stream: its ledger is not a beginning of this run's. "
            f"{remedy}, or go on with that stream: `hf_pm.from_hub({repo_id!r}, output_dir=...)`."
        )


# ---------------------------------------------------------------------------------------------------------------------
# One release


def release_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The files of a release by their path in the repository, sorted."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def push_release(
    folder: str | os.PathLike[str],
    *,
    repo_id: str,
    tag: str,
    commit_message: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    owned: Owned | None = None,
) -> str:
    """
    Make one try to upload one release folder to the Hub as one commit, and tag it.

    The branch becomes the folder: files of an earlier release that are gone disappear. Unchanged files are not sent
    again. Whatever an earlier try has left behind, the commit without its tag included, is recognised by its content,
    so that the same call may be repeated until it succeeds. The endpoint is the client's (`HF_ENDPOINT`).

    Args:
        folder (`str` or `os.PathLike`):
            Release folder. A `README.md` in it is validated first.
        repo_id (`str`):
            Repository, created when it does not exist.
        tag (`str`):
            Annotated tag to put on the commit, see [`cards.release_tag`].
        commit_message (`str`):
            Message of the commit and of the tag.
        token (`str`, *optional*):
            Access token; the client's stored one by default.
        private (`bool`, *optional*):
            Visibility of a repository that is created.
        revision (`str`, *optional*):
            Branch to write, created when it does not exist; `main` by default.
        owned (`Owned`, *optional*):
            What of the repository may be replaced; anything by default.

    Returns:
        `str`: the oid of the tagged commit.

    Raises:
        UserError: if the folder has no file, its card is wrong, the tag is on another release or the repository is
            another stream's.
        [`~huggingface_hub.errors.HfHubHTTPError`]: if the Hub refuses a request.
    """
    files = release_files(folder)
    if not files:
        raise UserError(
            f"`folder={Path(folder).name!r}` has no file to push: a release is a folder with a checkpoint. "
            "Write the release first."
        )
    if "README.md" in files:
        validate_card(files["README.md"].read_text(encoding="utf-8"))

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    tagged = _tagged_commit(api, repo_id, tag)
    if tagged is not None:
        if _holds(api, repo_id, tagged, files):
            return tagged
        raise _tag_conflict(repo_id, tag, tagged)
    if owned is not None:
        _check_owner(api, repo_id, revision, owned)
    # Of a try whose answer was lost the commit is there already; one from before a rollback is another matter.
    commits = api.list_repo_commits(repo_id, revision=revision)
    recent = takewhile(lambda commit: not commit.title.startswith(ROLLBACK), commits)
    same = (commit.commit_id for commit in recent if commit.title == commit_message)
    oid = next((oid for oid in same if _holds(api, repo_id, oid, files)), None)
    if oid is None:
        head = api.model_info(repo_id, revision=revision).sha
        gone = {item.path for item in _tree(api, repo_id, head)} - files.keys() - {".gitattributes"}
        # `upload_folder` may split a big folder into several commits; this is always one.
        oid = api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in sorted(gone)),
            ],
            commit_message=commit_message,
            revision=revision,
            parent_commit=head,
        ).oid

    # Others may push meanwhile: only the returned oid is the release.
    api.create_tag(repo_id, tag=tag, tag_message=commit_message, revision=oid, exist_ok=True)
    tagged = _tagged_commit(api, repo_id, tag)
    if tagged != oid:
        raise _tag_conflict(repo_id, tag, tagged)
    logger.info("%s: %s is commit %s", repo_id, tag, oid)
    return oid


def push_rollback(
    repo_id: str, *, to: str | None, retired: Mapping[str, str], token: str | None = None, revision: str | None = None
) -> None:
    """
    Make one try to bring a repository back to an earlier task; may be repeated like [`push_release`].

    Nothing is lost: the tags of the dropped tasks get other names, and the branch gets a new commit with the files of
    the earlier tag.

    Args:
        repo_id (`str`): The repository.
        to (`str`, *optional*): Tag whose files the branch gets; none at all by default.
        retired (`Mapping[str, str]`): Tag of each dropped task -> the name it gets instead.
        token (`str`, *optional*): Access token; the client's stored one by default.
        revision (`str`, *optional*): Branch; `main` by default.
    """
    api = HfApi(token=token)
    for old, new in retired.items():
        commit = _tagged_commit(api, repo_id, old)
        if commit is not None:
            api.create_tag(repo_id, tag=new, tag_message=f"Was {old}", revision=commit, exist_ok=True)
            api.delete_tag(repo_id, tag=old)
    head = api.model_info(repo_id, revision=revision).sha
    present = {item.path: _content(item) for item in _tree(api, repo_id, head)}
    wanted = {item.path: _content(item) for item in _tree(api, repo_id, to)} if to else {}
    changed = [path for path, content in wanted.items() if present.get(path) != content]
    gone = present.keys() - wanted.keys() - {".gitattributes"}
    if changed or gone:
        api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationCopy(path, path, src_revision=to) for path in changed),
                *(CommitOperationDelete(path_in_repo=path) for path in sorted(gone)),
            ],
            commit_message=f"{ROLLBACK} {to or 'the base'}",
            revision=revision,
            parent_commit=head,
        )


def tree_hashes(repo_id: str, revision: str, token: str | None = None) -> dict[str, tuple[str, str]]:
    """Content of every file of a revision without downloading it: path -> (`"sha256"` or `"git"`, hash)."""
    return {item.path: _content(item) for item in _tree(HfApi(token=token), repo_id, revision)}


def file_hash(path: Path, kind: str) -> str:
    """Hash of a local file as [`tree_hashes`] gives it."""
    with open(path, "rb") as handle:
        if kind == "sha256":
            return hashlib.file_digest(handle, "sha256").hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
        return digest.hexdigest()


def _tree(api: HfApi, repo_id: str, revision: str | None) -> list[RepoFile]:
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return [item for item in tree if isinstance(item, RepoFile)]


def _content(item: RepoFile) -> tuple[str, str]:
    return ("git", item.blob_id) if item.lfs is None else ("sha256", item.lfs.sha256)


def _holds(api: HfApi, repo_id: str, revision: str, files: Mapping[str, Path]) -> bool:
    """Whether a commit's files are exactly `files`."""
    try:
        present = {item.path: _content(item) for item in _tree(api, repo_id, revision)}
    except (RevisionNotFoundError, EntryNotFoundError):
        return False
    present.pop(".gitattributes", None)
    return present.keys() == files.keys() and all(
        file_hash(files[path], kind) == content for path, (kind, content) in present.items()
    )


def _tagged_commit(api: HfApi, repo_id: str, tag: str) -> str | None:
    """Oid of the commit a tag stands for, `None` without such a tag."""
    if tag not in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
        return None
    try:
        # An annotated tag is an object of its own; the info of its revision names the commit.
        return api.model_info(repo_id, revision=tag).sha
    except RevisionNotFoundError:
        return None


def _tag_conflict(repo_id: str, tag: str, tagged: str | None) -> UserError:
    return UserError(
        f"Tag `{tag}` of {repo_id} is already on commit {tagged}, which holds another release; a tag never moves. "
        f'Push to another repo, or `huggingface_hub.delete_tag("{repo_id}", tag="{tag}")` and push again.'
    )
