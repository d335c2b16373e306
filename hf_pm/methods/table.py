"""The table of methods: a paper is a row of parts, not a class.

| part | question it answers |
|---|---|
| `start` | on which weights does a task begin, and with which adapter? |
| `perturbation` | at which scale does a training step see the update? |
| `penalties` | what is added to the loss? |
| `replay` | which rows of earlier tasks join the training rows? |
| `optimizer` | which optimizer moves the adapter? |
| `merge` | what of the trained update is kept? |
| `serve` | how is the result run? |
| `stream` | are the tasks seen one after another (`sequence`), all at once (`joint`), or each by itself (`bank`)? |

The names are those of `parts.PARTS`, which maps each to the class that does it.
"""

from typing import NamedTuple


class Method(NamedTuple):
    """One row: the paper, with what differs from it, and the name of each part."""

    paper: str
    perturbation: str = "none"
    merge: str = "last"
    penalties: tuple[str, ...] = ()
    replay: str = "none"
    start: str = "merged"
    optimizer: str = "optim"
    serve: str = "folded"
    stream: str = "sequence"


METHODS: dict[str, Method] = {
    "pm": Method("Perturb-and-Merge, arXiv 2505.22389", "task_vector", "pm"),
    # Its ablations: the closed form without perturbation, and isotropic noise of the same norm.
    "merge-only": Method("LoRA-M in arXiv 2505.22389", "none", "pm"),
    "gaussian": Method("LoRA-M with Gaussian noise in arXiv 2505.22389", "gaussian", "pm"),
    "pm-modules": Method("P&M with one alpha a matrix, arXiv 2505.22389", "task_vector", "pm_modules"),
    # Its curvature in the entries of A and B, with one adapter for all tasks (and without perturbation).
    "pm-factors": Method("LoRA-M with curvature of A and B, arXiv 2505.22389", merge="pm_factors", start="continued"),
    # Every update is kept whole: what people do today.
    "sequential": Method("IncLoRA in arXiv 2310.14152", merge="last"),
    "seq-lora": Method("SeqLoRA in arXiv 2310.14152: one adapter goes on", merge="last", start="continued"),
    "average": Method("running model averaging, alpha_t = 1/t, in arXiv 2505.22389", merge="average"),
    "fixed": Method("CoMA, arXiv 2312.08977", merge="fixed"),
    "cofima": Method("CoFiMA, arXiv 2312.08977", merge="cofima"),
    "became": Method(
        "the coefficient of BECAME, arXiv 2504.02666, without its first stage of projected gradients", merge="became"
    ),
    # Task vectors: what each task made of the base, or of the task before (`trained`), merged afterwards.
    "task-arithmetic": Method("task arithmetic, arXiv 2212.04089", merge="task_arithmetic", start="base"),
    "pic": Method("PIC, arXiv 2502.10966", merge="pic", start="base"),
    "dare": Method("DARE, arXiv 2311.03099", merge="dare", start="base"),
    "magmax": Method("MagMax, arXiv 2407.06322", merge="magmax", start="trained"),
    "opcm": Method("OPCM, arXiv 2501.09522", merge="opcm", start="base"),
    "fisher": Method("Fisher merging, arXiv 2111.09832", merge="fisher", start="base"),
    "regmean": Method("RegMean, arXiv 2212.09849", merge="regmean", start="base"),
    "iso-c": Method("Iso-C, arXiv 2502.04959", merge="iso_c", start="base"),
    "ties": Method("TIES-Merging, arXiv 2306.01708", merge="ties", start="base"),
    "smile": Method("SMILE, arXiv 2408.10174", merge="experts", start="base", serve="routed"),
    "ewc": Method("EWC, arXiv 1612.00796; online form of arXiv 1805.06370", penalties=("ewc",)),
    "lwf": Method("Learning without Forgetting, arXiv 1606.09282", penalties=("lwf",)),
    # Curvature as a Kronecker product: in training (of gradients and inputs, or mostly of inputs), or in the merge.
    "kronecker": Method("online structured Laplace, arXiv 1805.07810, on LoRA updates", penalties=("kronecker",)),
    "gram": Method("as `kronecker`, with the inputs' moments for A, and of G its mean diagonal", penalties=("gram",)),
    "subspace": Method("P&M's closed form over (r, r) matrices, with such curvature", merge="subspace"),
    "refit": Method("P&M's closed form over every adapter of the same rank, with such curvature", merge="refit"),
    "spectral": Method("P&M's closed form over every update, with such curvature", merge="spectral"),
    "pm-kronecker": Method(
        "P&M's perturbation and subspace merge with a Kronecker penalty, arXiv 2505.22389 and 1805.07810",
        "task_vector",
        merge="subspace",
        penalties=("kronecker",),
    ),
    # Updates that keep out of each other's way.
    "olora": Method("O-LoRA, arXiv 2310.14152", penalties=("olora",)),
    "n-lora": Method("N-LoRA, arXiv 2410.10179", penalties=("l1",)),
    "ella": Method("ELLA, arXiv 2601.02232", penalties=("ella",)),
    "inflora": Method("InfLoRA, arXiv 2404.00228", start="inflora"),
    "sd-lora": Method(
        "SD-LoRA, arXiv 2501.13198; magnitudes go on from task to task", merge="magnitudes", start="sd-lora"
    ),
    "slao": Method("SLAO, arXiv 2512.23017", merge="slao", start="slao"),
    "replay": Method("experience replay, arXiv 1902.10486", replay="buffer"),
    "rehearsal": Method(
        "self-synthesized rehearsal, after arXiv 2403.01244, without rows as examples", replay="rehearsal"
    ),
    "der": Method("DER++, arXiv 2004.07211", penalties=("der",), replay="memory"),
    "sril": Method(
        "SRIL, after arXiv 2305.05175: a reconstruction; interpolates once a task",
        penalties=("sril",),
        replay="memory",
        merge="selective",
    ),
    "mmkdda": Method(
        "MMKDDA, after arXiv 2209.06107: a reconstruction",
        penalties=("mmkdda",),
        replay="memory",
        optimizer="reptile",
    ),
    "td-vcl": Method("TD-VCL, arXiv 2410.07812, with Laplace posteriors", penalties=("td-vcl",), replay="memory"),
    # A posterior over the weights of one adapter, which all tasks share.
    "badam": Method("BAdam, arXiv 2309.08546, with one draw a step", start="continued", optimizer="badam"),
    # Upper bounds in the same harness: all tasks shuffled together, and one adapter per task on the base.
    "joint": Method("upper bound: multi-task training", stream="joint"),
    "single": Method("upper bound: one adapter per task", start="base", stream="bank"),
}


# Row -> when to use it, in half a sentence.
WHEN: dict[str, str] = {
    "pm": "the paper's own: one number a task says what is kept of it",
    "merge-only": "to see what the closed form does without the perturbation",
    "gaussian": "to see what the direction of the perturbation is worth",
    "pm-modules": "to see what one number for all matrices gives away",
    "pm-factors": "to see why curvature is measured of weights and not of A and B",
    "sequential": "the baseline that every other row has to beat",
    "seq-lora": "the same baseline where one adapter of rank r has to remain",
    "average": "nothing may be measured, and every task counts the same",
    "fixed": "nothing may be measured, and the latest tasks count most",
    "cofima": "as `fixed`, where a curvature pass a task is affordable",
    "became": "as `merge-only`, with half the state",
    "task-arithmetic": "tasks are trained apart, and any of them may be taken out again",
    "pic": "tasks are trained apart, and one adapter of rank r has to remain",
    "dare": "tasks are trained apart, with many small changes that hardly matter",
    "magmax": "tasks come one by one, and nothing may be measured",
    "opcm": "models that were trained apart arrive one by one",
    "fisher": "tasks are trained apart, and need different weights",
    "regmean": "tasks are trained apart, and their inputs tell them apart",
    "iso-c": "many tasks are trained apart, and a few shared directions dominate their sum",
    "ties": "tasks are trained apart, and pull the same weights in opposite directions",
    "smile": "tasks contradict each other, and the model may grow",
    "ewc": "the usual baseline, where a number for every weight fits",
    "lwf": "no state may be kept, and steps may be slower",
    "kronecker": "no row may be kept, the state must not grow, and one plain checkpoint remains",
    "gram": "as `kronecker`, to leave alone what the old inputs use, whatever the answers",
    "subspace": "as `refit`, where the columns and rows of the trained adapter must stay",
    "refit": "as `kronecker`, where the training must stay as it is",
    "spectral": "to see what the rank of `refit` gives away; for layers up to a few thousand wide",
    "pm-kronecker": "to see what the perturbation adds to `kronecker` and `subspace`",
    "olora": "the usual baseline of LoRA streams, for few tasks",
    "n-lora": "a baseline that looks at no other task",
    "ella": "as `ewc`, where no data may be looked at",
    "inflora": "no row may be kept, and few tasks come: directions run out",
    "sd-lora": "a baseline for few tasks: all adapters take part in the training",
    "slao": "one adapter of rank r has to remain, and nothing may be measured",
    "replay": "rows may be kept: try it first",
    "rehearsal": "no row may be kept, and the model writes plausible ones",
    "der": "rows may be kept, and steps may be slower",
    "sril": "rows may be kept; a baseline that distills features",
    "mmkdda": "rows may be kept, and new ones are seen once (`num_train_epochs: 1`); a baseline",
    "td-vcl": "rows may be kept, and the last posterior alone is not to be trusted",
    "badam": "one adapter has to remain, with a state no larger than it",
    "joint": "to know what all rows at once would give",
    "single": "to know what a task learns alone; somebody has to name it when the model is used",
}
