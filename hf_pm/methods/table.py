"""The table of methods: a paper is a row of parts, not a class.

| part | question it answers |
|---|---|
| `perturbation` | at which scale does a training step see the update? |
| `merge` | what of the trained update is kept? (the functions are in `merging.COEFFICIENTS`) |
| `start` | from which weights does a task begin: the merged model or the untouched base? |
| `stream` | are the tasks seen one after another or all at once? |
"""

from typing import NamedTuple


class Method(NamedTuple):
    perturbation: str
    merge: str
    start: str = "merged"
    stream: str = "sequence"


METHODS: dict[str, Method] = {
    # Perturb-and-Merge, arXiv 2505.22389.
    "pm": Method("task_vector", "pm"),
    # Its ablations: the closed form without perturbation (LoRA-M), and isotropic noise of the same norm.
    "merge-only": Method("none", "pm"),
    "gaussian": Method("gaussian", "pm"),
    # Every update is kept whole (IncLoRA in arXiv 2310.14152): what people do today.
    "sequential": Method("none", "last"),
    # Running model averaging, alpha_t = 1/t.
    "average": Method("none", "average"),
    # CoMA with a constant weight (Marouf et al., ECCV 2024).
    "fixed": Method("none", "fixed"),
    # Upper bounds in the same harness: all tasks shuffled together, and one adapter per task on the base.
    "joint": Method("none", "last", stream="joint"),
    "single": Method("none", "last", start="base"),
}

PERTURBATIONS = ("task_vector", "gaussian", "none")
