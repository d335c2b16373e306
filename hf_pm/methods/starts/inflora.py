"""InfLoRA: the adapter reads its inputs along designed directions that earlier tasks do not use."""

from typing import Any

import torch
from peft import PeftModel

from ...errors import UserError
from ...weights import adapters, kronecker
from ...weights.kronecker import Symmetric
from ...weights.states import StoredState, Value
from ..contract import Ended, Setting, Start, Task


class InfLora(Start):
    """InfLoRA (Liang and Li 2024, arXiv 2404.00228): A is designed from the inputs and frozen, B alone is trained.

    With C the second moment of what a layer reads in the new task and M an orthonormal basis of what it read in the
    tasks before, the rows of A are the leading eigenvectors of (I - M M^T) C (I - M M^T), of norm 1 / sqrt(3) as the
    rows of LoRA's own start have in the mean. So A x = 0 for every old input x in the span of M, whatever B becomes.
    After the task M takes in the leading directions of its inputs, until `inflora_threshold` of their mean square lies
    in the span of M (gradient projection memory, arXiv 2103.09762). Where no direction is left, a row of A is zero.
    The authors' code decomposes (I - M M^T) C instead and counts squared eigenvalues, so that their 0.98 keeps fewer
    directions; there, the threshold may also rise from task to task.
    Keeps M of every layer, (in, k) with k at most in: it grows until the old inputs are covered. Costs two forward
    passes over `curvature_num_samples` rows and two eigendecompositions a layer and task. C is summed up whole up to
    a side of 2048; of wider layers the leading 1024 directions count. Default: 0.95 is the authors' for CIFAR-100, of
    squared eigenvalues.
    """

    settings = {"inflora_threshold": Setting(0.95, "must lie in (0, 1]", lambda value: 0 < value <= 1)}
    measures = frozenset({"inputs"})
    cost = dict.fromkeys(("start", "end"), "one forward pass over the curvature rows, one eigendecomposition a layer")
    growth = "the directions of the old inputs of every layer, at most a square matrix"
    cut_rank = 1024

    def keeps(self) -> dict[str, str]:
        return {"memory": "basis"}

    def check(self, method: Any, task_type: str) -> str | None:
        if method.stream != "sequence":
            return (
                f"`start: inflora` keeps out of the way of earlier tasks, but `stream: {method.stream}` has none. Use "
                "`start: merged`."
            )
        return None

    def attach(self, model: PeftModel) -> None:
        for name, layer in adapters.lora_layers(model).items():
            if adapters.is_experts(layer):
                raise UserError(
                    f"`start: inflora` needs layers with inputs of their own, but {name!r} is a bare parameter "
                    "(`lora_target_parameters`). Adapt linear layers only, or use `penalty: ewc`."
                )

    def adapter(self, task: Task) -> None:
        moments = task.input_moments()
        super().adapter(task)
        weights = {n: layer.lora_A[adapters.ADAPTER].weight for n, layer in adapters.lora_layers(task.model).items()}
        designed = {n: design(moments[n], memory_of(task.before, n), len(A)) for n, A in weights.items()}
        if not any(A.any() for A in designed.values()):
            raise UserError(
                f"No input direction is left for task {task.name!r}: those of the earlier tasks fill every adapted "
                "layer. Lower `inflora_threshold`, or use `penalty: kronecker`, which weighs directions."
            )
        adapters.load_factors(task.model, {name: (A, None) for name, A in designed.items()})
        for weight in weights.values():
            weight.requires_grad_(False)

    def end_matrix(self, ended: Ended, name: str) -> dict[str, Value]:
        C, memory = ended.measured.inputs[name], memory_of(ended.before, name)
        return {"memory": extend(memory, C, self["inflora_threshold"]).float()}


def memory_of(before: StoredState, name: str) -> torch.Tensor | None:
    """M of the tasks before, orthonormal in float64 whatever it was rounded to; `None` before the first."""
    stored = before.get("memory", name)
    return None if stored is None else torch.linalg.qr(stored.double()).Q


def remainder(C: Symmetric, memory: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues above rounding, descending, and eigenvectors of (I - M M^T) C (I - M M^T), in float64.

    Of a cut C only the leading directions count, not the diagonal of the rest.

    Args:
        C (`torch.Tensor` or `Cut`): (in, in).
        memory (`torch.Tensor`, *optional*): M, (in, k), orthonormal.
    """
    cut = isinstance(C, kronecker.Cut)
    floor = kronecker.FLOOR * float(kronecker.trace(C))
    matrix = C.roots.double() if cut else C.double()
    matrix = outside(memory, matrix)
    if cut:
        values, right = torch.linalg.eigh(matrix.mT @ matrix)
        vectors = matrix @ right
    else:
        values, vectors = torch.linalg.eigh(outside(memory, matrix.mT))
    kept = (values > floor).nonzero()[:, 0].flip(0)
    vectors = outside(memory, vectors[:, kept])  # once more: the smallest have lost digits
    return values[kept], vectors / torch.linalg.vector_norm(vectors, dim=0)


def outside(memory: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
    """(I - M M^T) @ matrix."""
    return matrix if memory is None else matrix - memory @ (memory.mT @ matrix)


def design(C: Symmetric, memory: torch.Tensor | None, rank: int) -> torch.Tensor:
    """A (rank, in), float64: orthogonal rows of norm 1 / sqrt(3) outside of M; zeros where no direction is left."""
    _, vectors = remainder(C, memory)
    A = torch.zeros(rank, len(vectors), dtype=torch.float64)
    A[: vectors.shape[1]] = vectors[:, :rank].mT / 3**0.5
    return A


def extend(memory: torch.Tensor | None, C: Symmetric, threshold: float) -> torch.Tensor:
    """M with as few more directions as are needed for tr(M^T C M) >= threshold * tr(C), as far as C has them."""
    values, vectors = remainder(C, memory)
    memory = vectors[:, :0] if memory is None else memory
    covered = float(kronecker.sandwich(C, memory).diagonal().sum())
    before = covered + values.cumsum(0) - values  # what is covered before a direction is added
    return torch.cat([memory, vectors[:, before < threshold * float(kronecker.trace(C))]], dim=1)
