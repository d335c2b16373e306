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
    """One row: the paper, and the name of each part."""

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
    "average": Method("running model averaging, alpha_t = 1/t", merge="average"),
    "fixed": Method("CoMA, Marouf et al., ECCV 2024", merge="fixed"),
    "cofima": Method("CoFiMA, Marouf et al., ECCV 2024", merge="cofima"),
    "became": Method("the coefficient of BECAME, arXiv 2504.02666", merge="became"),
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
    # Curvature as a Kronecker product: in training (of gradients and inputs, or inputs only), or in the merge.
    "kronecker": Method("online structured Laplace, arXiv 1805.07810, on LoRA updates", penalties=("kronecker",)),
    "gram": Method("its inputs' second moments alone", penalties=("gram",)),
    "subspace": Method("P&M's closed form over (r, r) matrices, with such curvature", merge="subspace"),
    "spectral": Method("P&M's closed form over every update, with such curvature", merge="spectral"),
    "pm-kronecker": Method(
        "P&M's perturbation and subspace merge with a Kronecker penalty",
        "task_vector",
        merge="subspace",
        penalties=("kronecker",),
    ),
    # Updates that keep out of each other's way.
    "olora": Method("O-LoRA, arXiv 2310.14152", penalties=("olora",)),
    "n-lora": Method("N-LoRA, arXiv 2410.10179", penalties=("l1",)),
    "ella": Method("ELLA, arXiv 2601.02232", penalties=("ella",)),
    "inflora": Method("InfLoRA, arXiv 2404.00228", start="inflora"),
    "sd-lora": Method("SD-LoRA, arXiv 2501.13198", merge="magnitudes", start="sd-lora"),
    "slao": Method("SLAO, arXiv 2512.23017", merge="slao", start="slao"),
    "replay": Method("experience replay, arXiv 1902.10486", replay="buffer"),
    "rehearsal": Method("self-synthesized rehearsal, after arXiv 2403.01244", replay="rehearsal"),
    "der": Method("DER++, arXiv 2004.07211", penalties=("der",), replay="memory"),
    "sril": Method("SRIL, arXiv 2305.05175", penalties=("sril",), replay="memory", merge="selective"),
    "mmkdda": Method("MMKDDA, after arXiv 2209.06107", penalties=("mmkdda",), replay="memory", merge="reptile"),
    "td-vcl": Method("TD-VCL, arXiv 2410.07812, with Laplace posteriors", penalties=("td-vcl",), replay="memory"),
    # A posterior over the weights of one adapter, which all tasks share.
    "badam": Method("BAdam, arXiv 2309.08546", start="continued", optimizer="badam"),
    # Upper bounds in the same harness: all tasks shuffled together, and one adapter per task on the base.
    "joint": Method("upper bound: multi-task training", stream="joint"),
    "single": Method("upper bound: one adapter per task", start="base", stream="bank"),
}
