"""Second moments of the rows' gradients, the Kronecker factors of a layer's curvature, and of what a layer reads.

[`Moments`] sums them up in the passes of `curvature.py`. [`watch_experts`] shows the products of experts, whose
weights have no module of their own.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..weights import kronecker
from ..weights.adapters import is_experts, lora_layers


# Random directions in which a row's gradient is looked at, a mean over which stands for all of it.
PROBES = 16


class Moments:
    """Sums over the rows of one process, as the pass comes by the layers. Float32.

    A row n whose tokens t read x_t, with d_t = d l / d(W x_t) for the sum l of its answer losses, has the gradient
    J_n = sum_t d_t x_t^T (out, in). With G = sum_n w_n J_n J_n^T and A = sum_n w_n J_n^T J_n, both of the trace
    tau = sum_n w_n ||J_n||^2, the curvature sum_n w_n vec(J_n) vec(J_n)^T is close to G (x) A / tau: one round of the
    power iteration for the nearest Kronecker product (Morwani et al. 2024, arXiv 2406.17748). Factors that take the
    tokens for independent (Ritter et al. 2018, arXiv 1805.07810) also hold inputs that no answer depends on.

    J_n is never formed. For a random vector z of signs J_n^T z (J_n^T z)^T has the mean J_n^T J_n, so that A is
    estimated from `PROBES` products D_n (X_n^T z) a row, and G likewise: signs of a row's own, from its number among
    the rows of all processes, so that batches and processes do not matter.

    What layers read is summed up apart: `inputs`, the sum over real tokens (prompt too, padding not) of x x^T.

    Small matrices are summed up whole, the others as a `kronecker.Sketch`: one process or many, the sums are those of
    all rows.

    Args:
        rank (`int`): Directions of each matrix that are wanted.
        device (`torch.device`, *optional*, defaults to `"cpu"`): Of the model.
        wanted (`Collection[str]`, *optional*): `kronecker`, for G and A, and `inputs`.
        seed (`int`, *optional*, defaults to 0): Of the signs.

    Attributes:
        G (`dict`): Layer -> the sum, (out, out). Every expert is a layer of its own, see [`expert_name`].
        A (`dict`): Layer -> the sum, (in, in).
        inputs (`dict`): Layer -> (in, in). Layers that read the same tensor (q, k, v) share one object.
        tokens (`dict`): Layer -> number of real tokens.
        leaders (`dict`): Layer -> the first layer that reads the same tensor.
    """

    def __init__(
        self,
        rank: int,
        device: torch.device | str = "cpu",
        wanted: Collection[str] = ("kronecker", "inputs"),
        seed: int = 0,
    ) -> None:
        self.rank = rank
        self.device = device
        self.sees_gradients = "kronecker" in wanted
        self.sees_inputs = "inputs" in wanted
        self.G: dict[str, torch.Tensor | kronecker.Sketch] = {}
        self.A: dict[str, torch.Tensor | kronecker.Sketch] = {}
        self._seed = seed
        self._rows: Sequence[int] = ()
        self._signs: dict[int, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor | kronecker.Sketch] = {}
        self._counts: dict[str, int] = {}
        self.leaders: dict[str, str] = {}
        self._readers = WeakTensorKeyDictionary()  # addresses and ids of freed tensors are those of others later
        self._columns: dict[int, torch.Tensor | None] = {}

    @property
    def inputs(self) -> dict[str, torch.Tensor | kronecker.Sketch]:
        return {name: self._sums[leader] for name, leader in self.leaders.items() if leader in self._sums}

    @property
    def tokens(self) -> dict[str, int]:
        return {name: self._counts[leader] for name, leader in self.leaders.items() if leader in self._counts}

    def columns(self, n: int) -> torch.Tensor | None:
        """Those of the sketches of side n; `None` where the sum is whole."""
        if n not in self._columns:
            whole = kronecker.summed_whole(n, self.rank)
            self._columns[n] = None if whole else kronecker.random_columns(n, self.rank, self.device)
        return self._columns[n]

    def leads(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether this layer is the first to read the input `tensor`, which is then to be added under its name."""
        self.leaders[name] = self._readers.setdefault(tensor, name)
        return self.leaders[name] == name

    def add_input(self, name: str, x: torch.Tensor) -> None:
        """Add x (tokens, in), without padding."""
        self._sums[name] = kronecker.add_outer(self._sums.get(name), x, self.columns(x.shape[-1]))
        self._counts[name] = self._counts.get(name, 0) + len(x)

    def begin_batch(self, rows: Sequence[int]) -> None:
        """The rows with these numbers come by."""
        self._rows = rows
        self._signs.clear()

    def signs(self, n: int) -> torch.Tensor:
        """The random vectors of the batch's rows, (rows, n, `PROBES`)."""
        if n not in self._signs:
            self._signs[n] = torch.stack([random_signs(self._seed, row, n) for row in self._rows]).to(self.device)
        return self._signs[n]

    def add_gradients(self, name: str, x: torch.Tensor, d: torch.Tensor, weights: torch.Tensor) -> None:
        """Add rows by x (rows, tokens, in) and d (rows, tokens, out), each with its weight (rows,)."""
        of_inputs = x.mT @ (d @ self.signs(d.shape[-1]).to(d.dtype))  # (rows, in, probes)
        of_outputs = d.mT @ (x @ self.signs(x.shape[-1]).to(x.dtype))
        each = (weights / PROBES).repeat_interleave(PROBES)
        for sums, products in ((self.A, of_inputs), (self.G, of_outputs)):
            vectors = products.mT.flatten(0, 1)
            sums[name] = kronecker.add_outer(sums.get(name), vectors, self.columns(vectors.shape[-1]), each)


def row_seed(seed: int, row: int, n: int = 0) -> int:
    """Seed of what is drawn for one row: its labels (n = 0), or its signs for matrices of side n."""
    return ((seed * 1_000_003 + row) * 1_000_003 + n) % 2**63


def random_signs(seed: int, row: int, n: int) -> torch.Tensor:
    """The signs of one row for matrices of side n, (n, `PROBES`) float32; the same on every machine."""
    generator = torch.Generator().manual_seed(row_seed(seed, row, n))
    return torch.randint(0, 2, (n, PROBES), generator=generator).mul_(2).sub_(1).float()


def expert_name(name: str, expert: int) -> str:
    """Name under which [`Moments`] has an expert of the stacked parameter `name`."""
    return f"{name}[{expert}]"


def moment_bytes(shapes: Mapping[str, Sequence[int]], rank: int, wanted: Collection[str]) -> int:
    """Bytes of the sums of [`Moments`] in one process, for matrices of these shapes (..., out, in) that share no
    input."""
    numbers = 0
    for *experts, rows, columns in shapes.values():
        sides = ([rows, columns] if "kronecker" in wanted else []) + ([columns] if "inputs" in wanted else [])
        sizes = [n * (n if kronecker.summed_whole(n, rank) else kronecker.sketch_size(rank) + 1) for n in sides]
        numbers += math.prod(experts) * sum(sizes)
    return 4 * numbers


class Products(TorchFunctionMode):
    """Sees every product with a bare parameter while the module that owns it runs: an expert's weight is used where
    its tokens are, and no module of its own has them as inputs.

    Args:
        parameters (`Mapping`): Name of the matrix -> of the module's parameter.
        see (`Callable`): `see(name, x, out)` for out = x W^T or x W, x (tokens, in); `name` is that of the expert.
    """

    functions = {
        nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm,
        torch.mm, torch.Tensor.mm,
    }  # fmt: skip

    def __init__(self, parameters: Mapping[str, str], see: Callable[[str, torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.parameters = parameters
        self.see = see
        self.weights: dict[str, torch.Tensor] = {}

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # With the adapter in them: PEFT computes them once a forward pass and caches them.
        self.weights = {name: getattr(module, parameter) for name, parameter in self.parameters.items()}
        self.__enter__()

    def leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.__exit__(None, None, None)
        self.weights = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.functions and len(args) > 1:
            x, factor = args[:2]
            for name, weight in self.weights.items():
                if factor is weight or factor._base is weight:
                    self._tell(name, weight, x, factor, out)
        return out

    def _tell(self, name: str, weight: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> None:
        if weight.ndim == 2:
            self.see(name, x.reshape(-1, x.shape[-1]), out)
        elif factor.ndim == 2:
            expert = (factor.storage_offset() - weight.storage_offset()) // weight.stride(0)
            self.see(expert_name(name, expert), x, out)
        else:  # all experts at once
            for expert in range(len(factor)):
                self.see(expert_name(name, expert), x[expert], out[expert])


def watch_experts(model: PeftModel, see: Callable[[str, torch.Tensor, torch.Tensor], None], hooks: ExitStack) -> None:
    """Show the products of all experts to `see`, as [`Products`] has it, until `hooks` end."""
    hooks.enter_context(_eager_experts(model))
    layers = {name: layer for name, layer in lora_layers(model).items() if is_experts(layer)}
    modules: dict[nn.Module, dict[str, str]] = {layer.get_base_layer(): {} for layer in layers.values()}
    for name, layer in layers.items():
        modules[layer.get_base_layer()][name] = layer.parameter_name
    for module, parameters in modules.items():
        watch = Products(parameters, see)
        hooks.callback(module.register_forward_pre_hook(watch.enter).remove)
        hooks.callback(module.register_forward_hook(watch.leave, always_call=True).remove)


@contextmanager
def _eager_experts(model: PeftModel) -> Iterator[None]:
    """Experts one after another, each with its own tokens, where the model has several ways to run them."""
    base = model.get_base_model()
    before = base.get_experts_implementation()
    base.set_experts_implementation("eager")
    try:
        yield
    finally:
        base.set_experts_implementation(before)
