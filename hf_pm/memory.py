"""Bytes of memory that each stage of a recipe takes in one process, from the shapes of the model alone.

The rules, for a GPU (without one, everything is on the machine):

| what | bytes |
|---|---|
| weights | of every parameter once, in the live dtype; 4-bit: half a byte and the scale of each block; 8-bit: one |
| adapter | values, gradients and the two averages of Adam (1 byte each for an 8-bit optimizer; none for SGD) |
| messages | with several processes, the gradients once more |
| activations | what autograd saves in a forward pass of `max_length` tokens a row, counted without weights |
| recomputation | with checkpointing, one layer's share of what would be saved without |
| curvature | what the pass sums up on the GPU, its activations, and three float32 copies around the largest matrix |
| certificate | the live weights, and beside them the release as a user loads it |

A GPU needs `OVERHEAD` and `SLACK` on top: the context of CUDA, and holes between the blocks of the allocator.

With FSDP2 over N processes:

| what | bytes |
|---|---|
| weights | an N-th of the above |
| gathered | the head, which stays from forward to backward, and twice the two largest of the other groups |
| certificate | an N-th of the release, whose shards take the place of the live ones |
| curvature, adapter | the same in each process, whatever N is; sums of the size of a matrix are kept on the host |

The host of a GPU, for each process:

| what | bytes |
|---|---|
| imports | `IMPORTS`, measured without a GPU |
| loading | the whole base in the live dtype; the files of one that is quantized, an N-th of them for shards |
| staging | pinned, to fold weights in: a matrix for each worker, for each power of two that sizes round up to |
| measured | what the curvature pass summed up: all processes hold it until the task is merged |
| merging | on the main process: what is kept of the largest matrix, before and after, and its dense updates |
| certificate | the files of the release, an N-th of them for shards |

Files are mapped until the last weight is copied to the GPU: their pages count, and the system can take them back. A
release whose base is neither sharded nor quantized is loaded by the main process alone.
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from .config import PMConfig, Recipe
from .errors import UserError
from .methods.curvature import CHUNK
from .methods.moments import moment_bytes
from .methods.parts import Parts
from .weights.folding import MAX_WORKERS
from .weights.states import state_bytes


OVERHEAD, SLACK = 1 << 30, 1.05
# Of a process that has imported the package and holds no weight: 482 to 484 MiB by scripts/benchmark_sharding.py.
IMPORTS = 484 << 20
# Values that share a float32 scale in a 4-bit base, and bytes of the scale with and without double quantization.
BLOCK_4BIT, SCALE, SCALE_TWICE = 64, 4.0, 1 + 4 / 256
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
ATTENTION = "hf_pm_counted"


class Sizes(NamedTuple):
    """What the memory of a recipe follows from.

    `plain` and `quantizable`: numbers of parameters, those of the linear layers that a quantized base quantizes apart.
    `whole` and `checkpointed`: bytes that autograd saves a row, without and with checkpointing; `layer`: those of one
    layer. `trainable`: numbers of the adapter. `around`: inputs and outputs of the largest matrix, a token. `sums` and
    `held` are the bytes of what the curvature pass sums up by estimator, and of what penalties hold. With `sharded`
    the base is spread over `processes`, and `gathered` are the parameters that a pass holds whole, copies included.
    """

    plain: int
    quantizable: int
    itemsize: int
    trainable: int
    whole: int
    checkpointed: int
    layer: int
    around: int
    sums: Mapping[str, int]
    held: int
    releases: bool
    processes: int = 1
    sharded: bool = False
    gathered: int = 0


class Choice(NamedTuple):
    """Keys of a recipe that memory depends on, and that change neither the data nor the method."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool
    curvature_batch_size: int
    curvature_estimator: str
    load_in_4bit: bool
    load_in_8bit: bool
    double_quantization: bool
    optim: str
    max_length: int


class Memory(NamedTuple):
    """Bytes in one process: the parts, and the sum of those that a stage has at once."""

    weights: int
    gathered: int
    adapter: int
    activations: int
    training: int
    curvature: int
    certificate: int

    def needed(self) -> int:
        """Memory of a GPU on which the stream finishes: without room for it, the certificate is left out."""
        return int(SLACK * max(self.training, self.curvature)) + OVERHEAD


class Host(NamedTuple):
    """Bytes of host memory in one process beside a GPU, by the rules of this file; `merging` in the main one only."""

    imports: int
    loading: int
    staging: int
    measured: int
    merging: int
    certificate: int

    def needed(self, main: bool) -> int:
        """The most that a process has at once. Staging memory is kept from the first fold to the end of the run."""
        merging = self.measured + (self.merging if main else 0)
        return self.imports + max(self.loading, self.staging + max(merging, self.certificate))


def host_of(
    recipe: Recipe,
    sizes: Sizes,
    shapes: Mapping[str, Sequence[int]],
    *,
    files: int,
    measured: int,
    merging: int,
) -> Host:
    """Host memory of a recipe on GPUs.

    Args:
        recipe (`Recipe`): The settings.
        sizes (`Sizes`): Of the model.
        shapes (`Mapping`): Adapted matrix -> shape.
        files (`int`): Bytes of the weight files of the base; those of a release are about as large.
        measured (`int`): Bytes that a measuring pass leaves on the host.
        merging (`int`): Bytes that a merge adds on the main process.
    """
    shards = sizes.processes if sizes.sharded else 1
    loading = (sizes.plain + sizes.quantizable) * sizes.itemsize
    if recipe.load_in_4bit or recipe.load_in_8bit or sizes.sharded:
        loading = math.ceil(files / shards)
    certificate = math.ceil(files / shards) if sizes.releases else 0
    return Host(IMPORTS, loading, staging_bytes(shapes, sizes.itemsize, shards), measured, merging, certificate)


def staging_bytes(shapes: Mapping[str, Sequence[int]], itemsize: int, shards: int = 1) -> int:
    """Pinned bytes in which `Folder.into_model` folds matrices of these shapes for a GPU, at most.

    torch rounds a block up to a power of two and keeps it for blocks of the same size.
    """
    blocks = Counter(
        1 << (math.ceil(rows / shards) * math.prod(others) * itemsize - 1).bit_length()
        for rows, *others in shapes.values()
    )
    return sum(size * min(MAX_WORKERS, count) for size, count in blocks.items())


def choice_of(recipe: Recipe) -> Choice:
    """The keys of a recipe that `memory` reads."""
    double = bool((recipe.quantization_kwargs or {}).get("bnb_4bit_use_double_quant"))
    optim = getattr(recipe.optim, "value", recipe.optim)
    fixed = {"double_quantization": double, "optim": str(optim)}
    fixed["activation_checkpointing"] = bool(recipe.activation_checkpointing)
    return Choice(**{name: fixed.get(name, getattr(recipe, name, None)) for name in Choice._fields})


def memory(sizes: Sizes, choice: Choice) -> Memory:
    """Bytes of each stage, by the rules of this file."""
    each = float(sizes.itemsize)
    if choice.load_in_4bit:
        each = 0.5 + (SCALE_TWICE if choice.double_quantization else SCALE) / BLOCK_4BIT
    elif choice.load_in_8bit:
        each = 1.0
    shards = sizes.processes if sizes.sharded else 1
    weights = math.ceil(int(sizes.plain * sizes.itemsize + sizes.quantizable * each) / shards)
    gathered = sizes.gathered * sizes.itemsize if sizes.sharded else 0
    moving = 0 if "sgd" in choice.optim or "adafactor" in choice.optim else 2 if "8bit" in choice.optim else 8
    adapter = sizes.trainable * (4 + (4 if sizes.processes == 1 else 8) + moving)

    def activations(rows: int) -> int:
        if choice.activation_checkpointing:
            return rows * (sizes.checkpointed + sizes.layer)
        return rows * sizes.whole

    together = weights + gathered + adapter + sizes.held
    rows = choice.curvature_batch_size
    copies = 3 * 4 * rows * choice.max_length * sizes.around + 4 * CHUNK
    sums = sizes.sums[choice.curvature_estimator] if sizes.sums else 0
    curvature = together + activations(rows) + copies + sums if sizes.sums else 0
    released = math.ceil((sizes.plain + sizes.quantizable) * sizes.itemsize / shards) if sizes.releases else 0
    models = max(weights, released) if sizes.sharded else weights + released
    return Memory(
        weights=weights,
        gathered=gathered,
        adapter=adapter,
        activations=activations(choice.per_device_train_batch_size),
        training=together + activations(choice.per_device_train_batch_size),
        curvature=curvature,
        certificate=models + gathered + adapter,
    )


def fitting(sizes: Sizes, choice: Choice, limit: int) -> Choice | None:
    """The recipe with the fewest changes that needs at most `limit` bytes of a GPU; `None` if none of them is enough.

    In order: checkpointing, fewer rows at once in training (a step keeps its rows) and in the curvature pass, factored
    curvature, 4-bit weights (not on shards, which cannot be quantized). A change that is of no help to the stage that
    is too large is not made.
    """
    rows = [
        lambda c: c._replace(activation_checkpointing=True),
        _half_the_rows,
        lambda c: c._replace(curvature_batch_size=max(1, c.curvature_batch_size // 2)),
        lambda c: c._replace(curvature_estimator="factored") if c.curvature_estimator == "diagonal" else c,
    ]
    weights = [lambda c: c if c.load_in_8bit or sizes.sharded else c._replace(load_in_4bit=True)]
    # 4-bit weights make room for rows, too: they come last, or first where that changes less.
    found = [
        reached for order in ([*rows, *weights], [*weights, *rows]) if (reached := _reach(sizes, choice, limit, order))
    ]
    return min(found, key=lambda c: sum(a != b for a, b in zip(c, choice, strict=True)), default=None)


def _reach(sizes: Sizes, choice: Choice, limit: int, changes: Sequence[Callable[[Choice], Choice]]) -> Choice | None:
    """Make the first change that lowers the largest stage, again and again, until `limit` is reached."""
    while (now := memory(sizes, choice)).needed() > limit:
        largest = "training" if now.training >= now.curvature else "curvature"
        helpful = (
            c for change in changes if getattr(memory(sizes, c := change(choice)), largest) < getattr(now, largest)
        )
        choice = next(helpful, None)
        if choice is None:
            return None
    return choice


def _half_the_rows(choice: Choice) -> Choice:
    rows = choice.per_device_train_batch_size
    if rows % 2:
        return choice
    return choice._replace(
        per_device_train_batch_size=rows // 2, gradient_accumulation_steps=2 * choice.gradient_accumulation_steps
    )


def parse_bytes(text: str) -> int:
    """`24GB`, `80GiB` or a number of bytes as an integer.

    Raises:
        UserError: For anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS or not float(found[1]):
        raise UserError(f"`--gpu_memory` must be a number of bytes such as 24GB or 80GiB, but got {text!r}.")
    return int(float(found[1]) * UNITS[found[2].upper()])


# ---------------------------------------------------------------------------------------------------------------------
# Counting, on a model without weights


def sizes_of(recipe: Recipe, model: PeftModel, shapes: Mapping[str, Sequence[int]], answers: int) -> Sizes | None:
    """Count what the memory of a recipe follows from.

    Args:
        recipe (`Recipe`): The settings.
        model (`PeftModel`): On the meta device, with its adapter; its dtype is changed.
        shapes (`Mapping`): Adapted matrix -> shape.
        answers (`int`): Positions of a row at which something is predicted.

    Returns:
        `Sizes`, or `None` if the architecture cannot be run without weights.
    """
    inner = model.get_base_model()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    dtype = _live_dtype(recipe, inner)
    plain, quantizable = _parameters(inner, (recipe.quantization_kwargs or {}).get("llm_int8_skip_modules") or ())
    # Where products are made in a narrow dtype, so is what they save.
    narrow = torch.bfloat16 if recipe.bf16 else torch.float16 if recipe.fp16 else dtype
    model.to(narrow)
    try:
        whole, checkpointed = (
            saved_bytes(model, recipe.max_length, answers, checkpointing) for checkpointing in (False, True)
        )
    except (RuntimeError, ValueError, TypeError, AttributeError):  # what needs values finds none on the meta device
        return None
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    parts = Parts(recipe.resolved_method(), recipe)
    return Sizes(
        plain=plain,
        quantizable=quantizable,
        itemsize=dtype.itemsize,
        trainable=trainable,
        whole=whole,
        checkpointed=checkpointed if layers else whole,
        layer=math.ceil(whole / layers) if layers else 0,
        around=max(shape[-1] + shape[-2] for shape in shapes.values()),
        sums=_sums(parts, shapes, recipe),
        held=_held(parts, shapes, recipe),
        releases=recipe.release != "none",
        processes=recipe.world_size,
        sharded=recipe.sharded,
        gathered=gathered_parameters(inner),
    )


def gathered_parameters(model: nn.Module) -> int:
    """Parameters of the base that a pass over shards holds whole at once, copies included.

    transformers groups modules by `fsdp_plan`. A group that keeps its weights has them until the backward pass ends,
    or until the next one. Of the others the one that is computed and the next are there, each twice: as it arrives
    from the other processes, and as weights.
    """
    modules, seen, kept, freed = dict(model.named_modules()), set(), 0, [0, 0]
    # What is tied belongs to the group that keeps it.
    plan = sorted((model.fsdp_plan or {}).items(), key=lambda item: item[1] != "keep_full_weight")
    for rule, style in plan:
        pattern = re.escape(rule).replace(r"\*", r"\d+")
        for module in (module for name, module in modules.items() if re.fullmatch(pattern, name)):
            own = {id(p): p.numel() for name, p in module.named_parameters() if "lora_" not in name}
            count = sum(number for key, number in own.items() if key not in seen)
            seen |= own.keys()
            if style == "keep_full_weight":
                kept += count
            else:
                freed.append(count)
    return kept + 2 * sum(sorted(freed)[-2:])


def _live_dtype(recipe: Recipe, model: nn.Module) -> torch.dtype:
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)
    dtype = getattr(model.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _parameters(model: nn.Module, kept: Sequence[str]) -> tuple[int, int]:
    """Numbers of parameters of the base: those that stay as they are, and those that a quantized base quantizes."""
    head = model.get_output_embeddings()
    tied = set() if head is None else set(map(id, head.parameters()))
    seen, plain, quantizable = set(), 0, 0
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) and not any(part in name for part in kept)
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or "lora_" in name or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if linear and key == "weight" and id(parameter) not in tied:
                quantizable += parameter.numel()
            else:
                plain += parameter.numel()
    return plain, quantizable


def _sums(parts: Parts, shapes: Mapping[str, Sequence[int]], config: PMConfig) -> dict[str, int]:
    """Estimator -> bytes that the measuring pass sums up on the device; empty if nothing is measured."""
    wanted = parts.measures()
    if not wanted:
        return {}
    entries = 4 * sum(math.prod(shape) for shape in shapes.values())
    if config.sharded and not config.use_cpu:
        entries = 0  # kept on the host
    fixed = entries if "gradient" in wanted else 0
    fixed += moment_bytes(shapes, parts.cut_rank, wanted)
    sides = state_bytes({"F": "factored"}, shapes, dtype="float32", rank=0) if "curvature" in wanted else 0
    dense = entries if "curvature" in wanted else 0
    return {"diagonal": fixed + dense, "factored": fixed + sides, "directional": fixed + sides}


def _held(parts: Parts, shapes: Mapping[str, Sequence[int]], config: PMConfig) -> int:
    """Bytes of the state that penalties read in every step."""
    keeps = {key: form for penalty in parts.penalties for key, form in penalty.keeps().items()}
    return state_bytes(keeps, shapes, dtype="float32", rank=0, cut=parts.cut_rank) if keeps else 0


class _Saving(torch.autograd.Function):
    """Attention that saves what a fused kernel does: its inputs, its output and a float32 sum for each query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _counted(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return _Saving.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _counted)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def saved_bytes(model: PeftModel, tokens: int, answers: int, checkpointing: bool) -> int:
    """Bytes that autograd saves in one forward pass of one row, the model's parameters aside.

    Args:
        model (`PeftModel`): On the meta device: nothing is computed.
        tokens (`int`): Of the row; of the encoder, if the model has one.
        answers (`int`): Positions with logits; tokens of the decoder, if the model has one.
        checkpointing (`bool`): Save the inputs of layers only. What a layer saves when it runs again is not counted.
    """
    inner = model.get_base_model()
    # A position bias that is learned is too large for a fused kernel to leave unsaved.
    fused = inner.config._attn_implementation != "eager" and not hasattr(
        inner.config, "relative_attention_num_buckets"
    )
    inner.set_attn_implementation(ATTENTION if fused else "eager")
    if checkpointing:
        inner.activation_checkpointing_enable({"use_reentrant": False})
    else:
        inner.activation_checkpointing_disable()
    model.train()
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # A mask of four dimensions is taken as it is; otherwise its values would be asked for.
    mask = ids if fused else torch.zeros(1, 1, 1, tokens, device="meta", dtype=next(inner.parameters()).dtype)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "use_cache" in inspect.signature(inner.forward).parameters:
        inputs["use_cache"] = False
    if inner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :answers]
    elif "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = answers
    kept: list[torch.Tensor] = []  # a storage that is freed may give its name to another

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())  # the result of a function, held by that function, would never be freed
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(**inputs).logits
        targets = torch.zeros(logits.shape[:-1], dtype=torch.long, device="meta")
        nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    return sum(size for name, size in storages.items() if name not in own)
