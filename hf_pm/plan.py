"""Estimate of a recipe before anything is trained: bytes on disk and in memory, steps, scores."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from accelerate import init_empty_weights

from .config import PMConfig, Recipe
from .errors import UserError
from .hub.releases import STATE_LIMIT
from .loading import ARCHITECTURES, LOADING_ERRORS, cannot_load, recipe_lora, recipe_stream
from .memory import IMPORTS, Choice, Host, Sizes, choice_of, fitting, host_of, memory, sizes_of
from .methods.contract import curvature_form
from .methods.moments import moment_bytes
from .methods.parts import Parts
from .methods.protection import Protection
from .probe import Seconds, probe_recipe, unknown_because
from .progress import clock
from .tasks.encoding import IGNORE_INDEX, Encoder
from .tasks.rows import StreamRows
from .weights import adapters
from .weights.bases import BaseCheckpoint
from .weights.merging import MAX_RANK
from .weights.sharding import check_architecture
from .weights.states import state_bytes


class Plan(NamedTuple):
    """Sizes in bytes and counts of a whole stream.

    `disk` is what the run folder holds at the end; `state` and `dense` are what a method keeps after a task, and what
    it stores as a task's payload beside the adapter; `merge_memory` is what a merge adds to the live model: what was
    measured of every matrix, which is the part `measured` and is held by every process, and what is kept of the
    largest one, by the main process. `protect` says which text is protected, `windows`
    and `protected_tokens` how many of its windows and tokens (at most, where the base generates them) are read forward
    and backward before the first task. `sizes` and `choice` are what the memory of a GPU follows from (`memory.py`);
    `push` is what the first task sends to the Hub. `seconds` is the estimate of `probe.py`; `untimed` says why there
    is none. `released_rows` are scored once more, on the releases of a quantized base. With `use_cpu` the memory is
    told as that of the machine. `host` is the memory of a process beside its GPU.
    """

    tasks: list[str]
    stages: int
    train_rows: list[int]
    test_rows: list[int]
    steps: int
    cells: int
    scored_rows: int
    matrices: int
    adapted_weights: int
    base: int
    adapter: int
    state: int
    state_files: int
    dense: int
    release: int
    releases: int
    disk: int
    free: int
    merge_memory: int
    measured: int = 0
    protect: str | None = None
    windows: int = 0
    protected_tokens: int = 0
    push: int = 0
    released_rows: int = 0
    sizes: Sizes | None = None
    choice: Choice | None = None
    host: Host | None = None
    seconds: Seconds | None = None
    use_cpu: bool = False
    untimed: str = "`--probe` loads the model, times a few steps, and estimates it"


class MethodBytes(NamedTuple):
    """Bytes that a method adds: the state file after a task, a task's dense update, the memory of a merge, and the
    part of it that was measured, which all processes hold."""

    state: int
    dense: int
    merge_memory: int
    measured: int


def method_bytes(shapes: Mapping[str, Sequence[int]], config: PMConfig) -> MethodBytes:
    """Bytes that follow from what the parts of the method declare.

    Args:
        shapes (`Mapping`): Matrix name -> shape.
        config (`PMConfig`): Method, estimator and dtype.
    """
    parts = Parts(config.resolved_method(), config)
    keeps, dense = parts.keeps(), parts.merge.dense
    measured = 0
    if "curvature" in parts.measures():
        measured = state_bytes({"F": curvature_form(config)}, shapes, dtype="float32", rank=0)
    if "gradient" in parts.measures():
        measured += 4 * sum(math.prod(shape) for shape in shapes.values())
    measured += moment_bytes(shapes, parts.cut_rank, parts.measures())
    # For one matrix at a time, old and new values of everything that is kept, and dense updates.
    at_once = 2 * len(keeps) + 1 if keeps else 0
    at_once += 3 if dense else 0
    squares = 8 * parts.merge.squares * max(sum(side**2 for side in shape[-2:]) for shape in shapes.values())
    return MethodBytes(
        state=state_bytes(keeps, shapes, dtype=config.curvature_dtype, rank=MAX_RANK, cut=parts.cut_rank),
        dense=4 * sum(math.prod(shape) for shape in shapes.values()) if dense else 0,
        merge_memory=measured + squares + 4 * at_once * max(math.prod(shape) for shape in shapes.values()),
        measured=measured,
    )


def plan_recipe(recipe: Recipe, probe: bool = False) -> Plan:
    """Read the data and the headers of the base, build the model without weights, and count.

    Args:
        recipe (`Recipe`): The settings.
        probe (`bool`, *optional*, defaults to `False`): Load the model, time a few steps, and estimate the time of the
            whole stream, if that is possible here.

    Raises:
        UserError: Whatever in the recipe cannot work; the same checks as before training.
    """
    peft_config, stream = recipe_lora(recipe), recipe_stream(recipe)
    trusted = recipe.trust_remote_code
    base = BaseCheckpoint.resolve(recipe.model_name_or_path, recipe.model_revision, code=trusted)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.folder, trust_remote_code=trusted)
        config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=trusted)
        with init_empty_weights():
            model = ARCHITECTURES[recipe.task_type].from_config(config, trust_remote_code=trusted)
        model.tie_weights()  # without weights, what is tied was made twice
        if recipe.sharded:
            check_architecture(
                ARCHITECTURES[recipe.task_type], config, recipe.model_name_or_path, trust_remote_code=trusted
            )
    except UserError:
        raise
    except LOADING_ERRORS as error:
        raise cannot_load(recipe, error) from error
    model = adapters.attach(model, peft_config, recipe.task_type)
    shapes = {name: tuple(adapters.base_weight(layer).shape) for name, layer in adapters.lora_layers(model).items()}
    recipe.settle_estimator(sum(math.prod(shape) for shape in shapes.values()))
    encoder = Encoder(tokenizer, recipe.task_type, recipe.max_length, recipe.prompt)
    rows = StreamRows(stream, encoder, recipe.resolved_method().stream, recipe)
    plan = estimate(recipe, rows, shapes, base_bytes=_size(base), adapter_bytes=_trainable(model))
    sizes = sizes_of(recipe, model, shapes, _predictions(recipe, rows))
    plan = plan._replace(sizes=sizes, choice=choice_of(recipe), use_cpu=recipe.use_cpu)
    if sizes is not None:
        merging = plan.merge_memory - plan.measured
        host = host_of(recipe, sizes, shapes, files=plan.base, measured=plan.measured, merging=merging)
        plan = plan._replace(host=host)
    if (recipe.load_in_4bit or recipe.load_in_8bit) and recipe.release != "none":
        plan = plan._replace(released_rows=plan.scored_rows - sum(plan.test_rows))
    if probe:
        reason = unknown_because(recipe, base)
        plan = plan._replace(untimed=reason) if reason else plan._replace(seconds=probe_recipe(recipe))
    if recipe.protect is None:
        return plan
    rank = Parts(recipe.resolved_method(), recipe).cut_rank
    text = Protection(recipe.protect, tokenizer, config, recipe, rank)
    if text.rows is None:
        windows, tokens = text.windows, text.windows * (text.length - 1)
    else:
        windows, tokens = len(text.rows), text.tokens
    return plan._replace(protect=text.kind, windows=windows, protected_tokens=tokens)


def _predictions(recipe: Recipe, rows: StreamRows) -> int:
    """Positions of a row at which a batch has logits, at most: those of all its rows' answers."""
    if recipe.task_type == "SEQ_CLS":
        return 1
    longest = max(sum(token != IGNORE_INDEX for token in labels) for split in rows.test for labels in split["labels"])
    if recipe.task_type == "SEQ_2_SEQ_LM":
        return longest
    return min(recipe.max_length, longest * max(recipe.per_device_train_batch_size, recipe.curvature_batch_size))


def _size(base: BaseCheckpoint) -> int:
    return sum((base.folder / file).stat().st_size for file in base.files)


def _trainable(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def estimate(
    config: PMConfig, rows: StreamRows, shapes: Mapping[str, Sequence[int]], *, base_bytes: int, adapter_bytes: int
) -> Plan:
    """The plan from its parts.

    Args:
        config (`PMConfig`): The settings.
        rows (`StreamRows`): What is learned and scored.
        shapes (`Mapping`): Adapted matrix -> shape.
        base_bytes (`int`): Weight files of the base.
        adapter_bytes (`int`): Trainable parameters of one adapter.
    """
    stages = rows.stages
    own_rows = [sum(len(rows.train[t]) for t in stage.learns) for stage in stages]
    parts = Parts(config.resolved_method(), config)
    train_rows = [own + parts.replay.added(own, own_rows[:number]) for number, own in enumerate(own_rows)]
    test_rows = [len(split) for split in rows.test]
    batch = config.effective_batch_size
    epochs = [rows.epochs(stage) for stage in stages]
    if config.max_steps > 0:
        steps = config.max_steps * len(stages)
    else:
        steps = sum(math.ceil(math.ceil(n / batch) * e) for n, e in zip(train_rows, epochs, strict=True))
    state, dense, merge_memory, measured = method_bytes(shapes, config)
    state_files = len(stages) if config.curvature_history == "all" else 1
    # An adapter release holds all adapters so far, stacked, and the release of a mixture all of them as experts.
    merged = base_bytes if config.release in ("merged", "both") else 0
    stacked = adapter_bytes if config.release in ("adapter", "both") or (merged and parts.merge.expert) else 0
    releases = len(stages) * merged + stacked * sum(range(1, len(stages) + 1))
    path = Path(config.output_dir).absolute()
    while not path.exists():
        path = path.parent
    pushed = state if config.hub_curvature and state <= STATE_LIMIT else 0
    return Plan(
        push=adapter_bytes + dense + merged + stacked + pushed,
        tasks=rows.stream.names,
        stages=len(stages),
        train_rows=train_rows,
        test_rows=test_rows,
        steps=steps,
        cells=len(test_rows) + sum(len(stage.scores) for stage in stages),
        scored_rows=sum(test_rows) + sum(test_rows[t] for stage in stages for t in stage.scores),
        matrices=len(shapes),
        adapted_weights=sum(math.prod(shape) for shape in shapes.values()),
        base=base_bytes,
        adapter=adapter_bytes,
        state=state,
        state_files=state_files,
        release=merged + stacked,
        releases=releases,
        dense=dense,
        disk=len(stages) * (adapter_bytes + dense) + state_files * state + releases,
        free=shutil.disk_usage(path).free,
        merge_memory=merge_memory,
        measured=measured,
    )


def fits(plan: Plan, gpu_memory: int | None) -> bool:
    """Whether the disk is large enough, and a GPU of `gpu_memory` bytes if one is named."""
    if gpu_memory is not None and plan.sizes is not None and memory(plan.sizes, plan.choice).needed() > gpu_memory:
        return False
    return plan.disk <= plan.free


def _memory_lines(plan: Plan, on_cpu: bool) -> list[tuple[str, str]]:
    if plan.sizes is None:
        return [("memory", "unknown: this architecture cannot be run without weights")]
    found = memory(plan.sizes, plan.choice)
    parts = {"weights": found.weights}
    if plan.sizes.sharded:
        parts = {f"weights (one of {plan.sizes.processes} shards)": found.weights, "gathered": found.gathered}
    parts |= {"adapter, gradients, optimizer": found.adapter, "activations of a training step": found.activations}
    stages = {"training": found.training, "curvature": found.curvature, "certificate": found.certificate}
    told = ", ".join(f"{name} {_bytes(size)}" for name, size in stages.items() if size)
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    merging = _bytes(plan.merge_memory - plan.measured)
    skipped = "the certificate and the scores of releases are" if plan.released_rows else "the certificate is"
    skipped = f"without room for the release, {skipped} left out"
    if on_cpu:
        return [
            ("memory", f"of each process: {listed}"),
            ("stages", f"{told}, one after another; {_bytes(plan.measured)} of what was measured until the task is "
             f"merged, and {merging} on the main process while merging; {_bytes(IMPORTS)} of imports on top "
             f"({skipped})"),
            *_unspread(plan),
        ]  # fmt: skip
    host = plan.host
    return [
        ("memory", f"of each process's GPU: {listed}"),
        ("stages", f"{told}; a GPU of {_bytes(found.needed())} is enough" + (
         "" if plan.sizes.sharded else f" ({skipped})")),
        ("host", f"of each process: {_bytes(host.imports)} of imports, {_bytes(host.loading)} while loading, "
         f"{_bytes(host.staging)} pinned to fold weights in, {_bytes(host.measured)} of what was measured until the "
         f"task is merged; on the main process {merging} while merging; {_bytes(host.certificate)} while the release "
         "is loaded; without a GPU, the stages come on top"),
        *_unspread(plan),
    ]  # fmt: skip


def _unspread(plan: Plan) -> list[tuple[str, str]]:
    """What dense curvature takes in each process, where the base itself is spread over them."""
    sums = plan.sizes.sums
    if not plan.sizes.sharded or plan.choice.curvature_estimator != "diagonal" or sums["diagonal"] == sums["factored"]:
        return []
    dense, where = (sums["diagonal"], "") if plan.use_cpu else (plan.measured, " on the host")
    text = f"`diagonal` sums up {_bytes(dense)} in each process{where}, however many there are"
    return [("curvature", f"{text}; `curvature_estimator: factored` {_bytes(sums['factored'])}")]


def _verdict(plan: Plan, gpu_memory: int) -> str:
    """Whether the recipe fits the GPU, and otherwise what to change."""
    if plan.sizes is None:
        return "Whether that fits the GPU is unknown."
    needed = memory(plan.sizes, plan.choice).needed()
    if needed <= gpu_memory:
        return f"It fits a GPU of {_bytes(gpu_memory)}."
    text = f"It does not fit a GPU of {_bytes(gpu_memory)}: {_bytes(needed)} are needed."
    other = fitting(plan.sizes, plan.choice, gpu_memory)
    if other is None:
        if plan.sizes.sharded:
            return f"{text} No change of batch sizes, checkpointing and estimator is enough: take more processes."
        return f"{text} No change of batch sizes, checkpointing, estimator and quantization is enough."
    changes = _changes(plan.choice, other)
    told = ", ".join(f"`{key}: {str(value).lower()}`" for key, value in changes.items())
    return f"{text} Set {told}: that takes {_bytes(memory(plan.sizes, other).needed())}."


def _changes(choice: Choice, other: Choice) -> dict[str, Any]:
    return {key: value for key, value in other._asdict().items() if getattr(choice, key) != value}


def plan_record(plan: Plan, gpu_memory: int | None = None) -> dict[str, Any]:
    """The plan for scripts. `memory`: bytes of each stage, and of the GPU they need; `host`: bytes of a process beside
    its GPU (`None` if unknown).

    With `gpu_memory`, `fits` as [`fits`] says, and `changes`: the keys that make the recipe fit the GPU, empty if none
    has to change, `None` if no change is enough or the memory is unknown.
    """
    record = {key: value for key, value in plan._asdict().items() if key not in ("sizes", "choice")}
    record["host"] = None if plan.host is None else plan.host._asdict()
    record["processes"] = None if plan.sizes is None else plan.sizes.processes
    record["seconds"] = None if plan.seconds is None else plan.seconds._asdict()
    if plan.seconds is not None:
        del record["untimed"]
    found = None if plan.sizes is None else memory(plan.sizes, plan.choice)
    record["memory"] = None if found is None else found._asdict() | {"needed": found.needed()}
    if gpu_memory is not None:
        other = None if plan.sizes is None else fitting(plan.sizes, plan.choice, gpu_memory)
        record["fits"] = fits(plan, gpu_memory)
        record["changes"] = None if other is None else _changes(plan.choice, other)
    return record


def _pushed_state(plan: Plan) -> str:
    limit = _bytes(STATE_LIMIT)
    if plan.state > STATE_LIMIT:
        return f"a state of {_bytes(plan.state)} is left out, as all over {limit}"
    return f"`hub_curvature: false` leaves out the {_bytes(plan.state)} of the state; one over {limit} always is"


def format_plan(plan: Plan, gpu_memory: int | None = None) -> str:
    """The plan as text, and whether the disk and a GPU of `gpu_memory` bytes are large enough."""
    lines = [
        ("tasks", f"{len(plan.tasks)} ({', '.join(plan.tasks)}), {plan.stages} training runs, {plan.steps:,} steps"),
        ("rows", f"{sum(plan.train_rows):,} to train on, {sum(plan.test_rows):,} to score"),
        ("scores", f"{plan.cells} cells, {plan.scored_rows:,} rows in all" + (
         f"; {plan.released_rows:,} rows more on releases, which are not quantized" if plan.released_rows else "")),
        ("adapted", f"{plan.matrices} matrices, {plan.adapted_weights:,} weights; one adapter {_bytes(plan.adapter)}"),
        ("base", _bytes(plan.base)),
        ("state", f"{_bytes(plan.state)} a task, {plan.state_files} kept; {_bytes(plan.merge_memory)} of memory while "
         "merging" + (f"; a dense update of {_bytes(plan.dense)} a task" if plan.dense else "")),
        ("releases", f"{_bytes(plan.release)} the first, {_bytes(plan.releases)} all"),
        ("run folder", f"{_bytes(plan.disk)} at the end; {_bytes(plan.free)} free"),
        ("push", f"{_bytes(plan.push)} for the first task; {_pushed_state(plan)}"),
        *_memory_lines(plan, plan.use_cpu and gpu_memory is None),
        ("time", _time(plan)),
    ]  # fmt: skip
    if plan.protect is not None:
        text = "text of the base, which it generates first" if plan.protect == "self" else "the text"
        how = f"{plan.windows:,} windows of {text}, {plan.protected_tokens:,} tokens"
        lines.append(("protect", f"{how}: one forward and backward pass before the first task"))
    text = "\n".join(f"{name:<11} {value}" for name, value in lines)
    if plan.disk > plan.free:
        text += (
            "\nThe disk is too small. Set `release: adapter` or `none`, `curvature_history: last`, "
            "`curvature_estimator: factored`, or another `output_dir`."
        )
    return text if gpu_memory is None else f"{text}\n{_verdict(plan, gpu_memory)}"


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return f"unknown: {plan.untimed}"
    parts = ", ".join(f"{name} {clock(value)}" for name, value in plan.seconds._asdict().items())
    return (
        f"about {clock(sum(plan.seconds))}: {parts}. Estimated from a few steps on this machine, the longest and the "
        "shortest rows: a fixed time a step, and a time a token. Loading, merging and writing files come on top"
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
