"""Releases that wait for their push: complete on disk, pushed in order, while the next task trains.

`outbox/task-01-<name>/` is a repository as it shall be after a task (links, which take no space), and the `.json` of
the same name says that it is complete. `pushed.json` remembers what is on the Hub. No failure here costs a run.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy

from ..config import PMConfig
from ..errors import UserError
from ..store.disk import check_space, disk_is_full, whole
from ..store.hub_metadata import check_repo_id, missing_base_id
from ..store.ledger import read_json, write_json
from ..store.lock import only_process
from ..tasks.stream import TaskStream
from . import publishing
from .cards import Card
from .publishing import Owned
from .releases import FACTS, PIPELINE_TAGS, Facts, Releases


logger = logging.getLogger(__name__)

PUSHED = "pushed.json"


class Outbox:
    """Writes the releases of a run and pushes them.

    In training, [`Outbox.prepare`] builds it; then, for each task, `release(number)` and `start()`, and `finish()` at
    the end. None of these three raises for a push that fails.

    Args:
        releases (`Releases`, *optional*): Those of the run; without them, on ranks that do not write, nothing happens.
        repo_id (`str`, *optional*): Where to push; nowhere by default.
        token (`str`, *optional*): Access token; the client's stored one by default.
        at_end (`bool`, *optional*, defaults to `False`): Push nothing before `finish()`.
    """

    def __init__(
        self, releases: Releases | None, repo_id: str | None = None, token: str | None = None, at_end: bool = False
    ) -> None:
        self.releases = releases
        self.repo_id = repo_id
        self.token = token
        self.at_end = at_end
        self.unwritten: dict[str, str] = {}  # tag -> why its release is not on disk
        self.reasons: dict[str, str] = {}  # tag -> why it is not on the Hub
        self._thread: threading.Thread | None = None
        if releases is not None:
            self.path = releases.path / "outbox"

    @classmethod
    def prepare(
        cls,
        run: Any,
        args: PMConfig,
        tokenizer: PreTrainedTokenizerBase,
        stream: TaskStream,
        task_type: str,
        repo_id: str | None,
    ) -> "Outbox":
        """Find out before training what would stop a release or a push after it, and record what they need.

        Args:
            run (`RunFolder`): Opened.
            args (`PMConfig`): The run's configuration.
            tokenizer (`PreTrainedTokenizerBase`): Becomes part of every release.
            stream (`TaskStream`): The tasks.
            task_type (`str`): `CAUSAL_LM`, `SEQ_2_SEQ_LM` or `SEQ_CLS`.
            repo_id (`str`, *optional*): Where to push; nowhere by default.

        Raises:
            UserError: Too little disk, a base without a Hub id, no token, no write access, a repository that holds
                something else, or metadata that the Hub refuses.
        """
        if not run.writes:
            return cls(None)
        facts = Facts.of_run(args, run.folder, run.stages, stream, task_type, repo_id)
        if repo_id is not None and facts.base_model is None:
            raise UserError(missing_base_id(facts.base_name))
        if (run.path / FACTS).is_file():
            # What this start does not say, an earlier one may have found out.
            known = Facts.read(run.path)
            facts = replace(facts, license=facts.license or known.license, repo_id=repo_id or known.repo_id)
            if len(run.ledger) and not known.labels:
                facts = replace(facts, labels=[])  # all releases of a run have heads of one kind
        releases = Releases(run.path, run.folder, facts)
        folders = [run.path / "releases" / releases.facts.tag(n) for n in range(1, len(run.stages) + 1)]
        missing = sum(not folder.is_dir() for folder in folders) if facts.kind != "none" else repo_id is not None
        kind = "merged" if facts.kind == "none" else facts.kind
        check_space(run.path, missing * releases.bytes_needed(kind), f"Writing {missing} release(s) of this run")
        at_end = args.hub_strategy == HubStrategy.END
        outbox = cls(releases, repo_id, args.hub_token, at_end)
        if repo_id is not None:
            outbox._check_hub(run.results)
        outbox._record(tokenizer)
        return outbox

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        repo_id: str | None = None,
        base: str | None = None,
        base_model_id: str | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> "Outbox":
        """The outbox of a run folder that no process is training in; what is given replaces what the run recorded.

        Args:
            path (`str` or `Path`): The run folder.
            repo_id (`str`, *optional*): Where to push.
            base (`str`, *optional*): Folder or Hub id of the base, if it is not where the run found it.
            base_model_id (`str`, *optional*): Hub id of a base that the run read from a local folder.
            private (`bool`, *optional*): Visibility of a repository that is created.
            token (`str`, *optional*): Access token; the client's stored one by default.

        Raises:
            UserError: If the run says neither where to push nor what its base is called on the Hub, or a file of it
                is missing or altered.
        """
        releases = Releases.open(path, base)
        known = releases.facts
        facts = replace(
            known,
            repo_id=repo_id or known.repo_id,
            base_model=base_model_id or known.base_model,
            private=known.private if private is None else private,
        )
        if facts.repo_id is None:
            raise UserError(f"{str(path)!r} was not pushed anywhere yet. Say where to: `--hub_model_id owner/name`.")
        check_repo_id(facts.repo_id)
        if facts.base_model is None:
            raise UserError(missing_base_id(facts.base_name))
        releases.facts = facts
        return cls(releases, facts.repo_id, token)

    def push_all(self) -> list[str]:
        """Push every task that is committed and evaluated, and not on the Hub yet.

        Returns:
            `list[str]`: As [`finish`].

        Raises:
            UserError: No token, no write access, a repository that holds something else, or a process that is training
                in the folder, and pushes by itself.
        """
        with only_process(self.releases.path):
            numbers = self.releases.scored()
            if not numbers:
                raise UserError(
                    f"{str(self.releases.path)!r} has no task that is committed and scored. Train one first."
                )
            self._check_hub(self.releases.results())
            self.releases.facts.write(self.releases.path)
            for number in numbers:
                self.enqueue(number)
            return self.finish()

    def _check_hub(self, results: dict[str, Any]) -> None:
        facts = self.releases.facts
        if not facts.license:
            asked = publishing.base_license(facts.base_model, facts.base_revision, self.token)
            self.releases.facts = facts = replace(facts, license=asked)
        card = Card(
            results=results | {"matrix": [[0.0]]},
            task_number=1,
            base_model=facts.base_model,
            repo_id=self.repo_id,
            license=facts.license,
            datasets=[name for names in facts.datasets for name in names],
            tags=facts.tags,
            pipeline_tag=PIPELINE_TAGS[facts.task_type],
            kind="merged" if facts.kind == "none" else facts.kind,
        )
        self.repo_id = publishing.check_repo(
            self.repo_id,
            card.render(),
            token=self.token,
            private=facts.private,
            revision=facts.revision,
            owned=self._owned(),
        )
        self.releases.facts = replace(facts, repo_id=self.repo_id)

    def _record(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The tokenizer, once, and `release.json`: from now on releases need nothing but the run folder."""
        folder = self.releases.path / "tokenizer"
        if not folder.is_dir():
            with whole(folder) as part:
                tokenizer.save_pretrained(part)
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        self.releases.facts = facts = replace(self.releases.facts, tokenizer=names)
        path = self.releases.path
        if not (path / FACTS).is_file() or Facts.read(path) != facts:
            facts.write(path)

    # ---- For each task ------------------------------------------------------------------------------------------

    def release(self, number: int, certify: Callable[[Path], None] | None = None) -> None:
        """Write the release of a task unless it is there, and queue it; a full disk costs the release only.

        `certify` is what [`Releases.write`] takes.
        """
        if self.releases is None:
            return
        tag = self.releases.facts.tag(number)
        self.unwritten.pop(tag, None)
        try:
            if self.releases.facts.kind != "none" and not (self.releases.path / "releases" / tag).is_dir():
                self.releases.write(number, repo_id=self.repo_id, certify=certify)
            self.enqueue(number)
        except (UserError, OSError) as error:
            if not isinstance(error, UserError) and not disk_is_full(error):
                raise
            self.unwritten[tag] = publishing.explain(error)
            logger.warning("The release %s was not written: %s The run goes on.", tag, self.unwritten[tag])

    def enqueue(self, number: int) -> None:
        """Put what the repository shall hold after a task into the outbox, unless it is there or on the Hub.

        Raises:
            UserError: If there is no such task, or the disk is too full.
        """
        if self.releases is None or self.repo_id is None:
            return
        tag = self.releases.facts.tag(number)
        item, folder = self.path / f"{tag}.json", self.path / tag
        if tag in self.pushed():
            return
        if not (item.is_file() and folder.is_dir() and read_json(item)["repo_id"] == self.repo_id):
            item.unlink(missing_ok=True)
            self.releases.stage(number, folder, self.repo_id)
            write_json(item, {"tag": tag, "number": number, "repo_id": self.repo_id, "tries": 0})

    def start(self) -> None:
        """Begin to push in the background, if anything is waiting and nothing is being pushed."""
        idle = self._thread is None or not self._thread.is_alive()
        if self.releases is not None and not self.at_end and idle and self.waiting():
            # A daemon: a run that ends by an error must not wait for the Hub, and the next start goes on with it.
            self._thread = threading.Thread(target=self._work, name="hf-pm outbox", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        with disable_progress_bars():
            while self.waiting() and not self.flush():
                pass

    def finish(self) -> list[str]:
        """Push what is left, and name what could not be pushed with the command that does it.

        Returns:
            `list[str]`: One line for each release that is not where it should be.
        """
        if self.releases is None:
            return []
        if self._thread is not None:
            self._thread.join()
        if self.waiting():
            with disable_progress_bars():
                self.flush()
        run, tags = (
            self.releases.path,
            [self.releases.facts.tag(n) for n in range(1, len(self.releases.facts.stages) + 1)],
        )
        left = [f"{tag} is not on {self.repo_id}: {reason}" for tag, reason in self.reasons.items()]
        left = [f"{line} Finish with: hf-pm push {run}" for line in left]
        for tag, reason in self.unwritten.items():
            command = f"push {run}" if self.repo_id else f"release {run} --task {tags.index(tag) + 1}"
            left.append(f"{tag} is not released: {reason} Finish with: hf-pm {command}")
        for line in left:
            logger.warning("%s", line)
        return left

    # ---- Pushing ------------------------------------------------------------------------------------------------

    def pushed(self) -> dict[str, Any]:
        """Tag -> `commit` and `tries`, for what is on the repository."""
        path = self.releases.path / PUSHED
        return read_json(path).get(self.repo_id, {}) if path.is_file() else {}

    def waiting(self) -> list[Path]:
        """The items of this repository, in the order in which they are pushed: rollbacks, then releases by number."""
        if self.repo_id is None:
            return []
        found = {path: read_json(path) for path in sorted(self.path.glob("*.json"))}
        items = [path for path, item in found.items() if item["repo_id"] == self.repo_id]
        return sorted(items, key=lambda path: found[path].get("number", 0))  # a rollback has none

    def flush(self) -> dict[str, str]:
        """Push what is waiting, oldest first, until something cannot be pushed.

        Returns:
            `dict[str, str]`: Tag -> reason, for what is still waiting; empty if nothing is.
        """
        with self._alone() as alone:
            if not alone:
                self.reasons = {"everything": "another process is pushing this run. Wait for it."}
                return self.reasons
            self.reasons = {}
            for item in self.waiting():
                try:
                    self._push(item)
                # A push must not cost a run, whatever the client or a server may raise.
                except Exception as error:
                    reason = publishing.explain(error)
                    # Not the next one either: tags and branch would get out of order.
                    self.reasons = {left.stem: reason for left in self.waiting()}
                    logger.warning(
                        "Pushing %s to %s failed: %s It is complete in %s, and tried again later.",
                        item.stem,
                        self.repo_id,
                        reason,
                        self.path,
                    )
                    break
                item.unlink()
                shutil.rmtree(self.path / item.stem, ignore_errors=True)
        return self.reasons

    def _push(self, path: Path) -> None:
        facts, item = self.releases.facts, read_json(path)
        where = {"token": self.token, "revision": facts.revision}
        if "retired" in item:
            back = partial(publishing.push_rollback, self.repo_id, to=item["to"], retired=item["retired"], **where)
            publishing.persistently(back, "Rolling back")
            return
        tag, folder = item["tag"], self.path / path.stem
        if tag != path.stem:
            raise UserError(f"{str(path)!r} names {tag!r}, which is not what it was made for. Do not trust it.")
        if not folder.is_dir():
            raise UserError(f"{str(folder)!r} is gone. Make it again with `hf-pm push`.")

        def push() -> str:
            item["tries"] += 1
            write_json(path, item)
            return publishing.push_release(
                folder,
                repo_id=self.repo_id,
                tag=tag,
                commit_message=f"Add {tag}",
                private=facts.private,
                owned=self._owned(),
                **where,
            )

        commit = publishing.persistently(push, f"Pushing {tag}")
        done = self.releases.path / PUSHED
        record = read_json(done) if done.is_file() else {}
        record.setdefault(self.repo_id, {})[tag] = {"commit": commit, "tries": item["tries"]}
        write_json(done, record)

    def _owned(self) -> Owned:
        dropped = [read_json(item).get("adapters", []) for item in self.waiting()]
        return Owned(
            [entry.adapter_sha256 for entry in self.releases.ledger.entries], [sha for shas in dropped for sha in shas]
        )

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether no other process pushes this run; none can while inside."""
        self.path.mkdir(exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True
            # Closing is not enough: a worker forked meanwhile would hold the lock on.
            fcntl.flock(folder, fcntl.LOCK_UN)
        finally:
            os.close(folder)

    def preview(self) -> list[tuple[str, list[tuple[str, int]], str]]:
        """Contents of a push, for each task that is not on the Hub: tag, files with their bytes, and the card."""
        shown = []
        pushed = self.pushed()
        for number in self.releases.scored():
            tag = self.releases.facts.tag(number)
            if tag in pushed:
                continue
            with tempfile.TemporaryDirectory(prefix=".preview", dir=self.releases.path) as folder:
                staged = Path(folder) / tag
                self.releases.stage(number, staged, self.repo_id)
                files = publishing.release_files(staged)
                sizes = [(name, path.stat().st_size) for name, path in files.items()]
                shown.append((tag, sizes, files["README.md"].read_text(encoding="utf-8")))
        return shown
