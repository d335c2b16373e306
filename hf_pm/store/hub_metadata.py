"""Rules of the Hub for repository names, licenses and tags; checked before anything is trained."""

import re
from difflib import get_close_matches
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError


# The identifiers that the Hub accepts (huggingface.co/docs/hub/repositories-licenses).
LICENSES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl "
    "lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma unknown other".split()
)


_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def check_license(license: str | None) -> None:
    """Refuse a license that the Hub does not know.

    Raises:
        UserError: Names the nearest identifiers.
    """
    if license is not None and license not in LICENSES:
        near = get_close_matches(str(license).lower(), sorted(LICENSES), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
        raise UserError(
            f"`license` must be an identifier of the Hub, but got {license!r}. {hint}Use 'other' for one that is not "
            "on the list (huggingface.co/docs/hub/repositories-licenses)."
        )


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that the Hub would refuse.

    Raises:
        UserError: Says which rule is broken.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"`hub_model_id` {repo_id!r} is no name for a repo: {' '.join(str(error).split())}") from error


def check_tags(tags: Any) -> None:
    """Refuse tags that are not texts: the Hub refuses a whole commit for one.

    Raises:
        UserError: Names the first one.
    """
    for tag in tags if isinstance(tags, list | tuple) else [tags]:
        if not isinstance(tag, str) or not tag.strip() or "\n" in tag:
            raise UserError(f"`tags` must be a list of texts, but it holds {tag!r}. Quote it, or leave it out.")


def missing_base_id(path: str) -> str:
    """Error message for a push of a run whose base is a local folder."""
    return (
        f"The base is a local folder ({last_part(path)!r}), which nobody else has: to be pushed, cards and adapters "
        "have to name its Hub id. Set `base_model_id` to `owner/name`, or train with `push_to_hub: false`."
    )


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as a Hub id."""
    return _HUB_ID.fullmatch(name) is not None


def last_part(path: str) -> str:
    """Last part of a local path, which shows nothing of this machine."""
    part = re.split(r"[\\/]+", path.rstrip("\\/"))[-1]
    return part.lstrip(".~") or "checkpoint"
