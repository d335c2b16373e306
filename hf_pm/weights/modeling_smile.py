"""A base model with routed low-rank experts: SMILE, a sparse mixture from zero-shot models (arXiv 2408.10174).

A release of hf_pm with `method: smile` holds a copy of this file, which needs torch, transformers and safetensors:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`config.json` says what the base is, and `experts.safetensors` holds the factors of every expert. In an adapted layer

    y = W x + sum over the top k experts e of w_e(x) B_e A_e x,    w = softmax of r_e(x) = ||V_e^T x|| over these k,

where V_e holds the top right singular vectors of B_e A_e. Each token of each layer chooses its own experts.
"""

import copy
import functools
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file


EXPERTS, CODE = "experts.safetensors", "modeling_smile.py"
# Relative to the largest singular value: a smaller one is rounding, and its vector arbitrary.
NEGLIGIBLE = 1e-6


def router(A: torch.Tensor, B: torch.Tensor, rank: int) -> torch.Tensor:
    """V^T: the top right singular vectors of B A, (min(rank, r, in), in), float64.

    From the QR factors B = Q_b R_b and A^T = Q_a R_a follows B A = Q_b (R_b R_a^T) Q_a^T, whose core is (r, r).
    A vector without a singular value is zero: an expert without an update asks for no token.
    """
    Q, R = torch.linalg.qr(A.double().mT)
    _, singular, vectors = torch.linalg.svd(torch.linalg.qr(B.double(), mode="r").R @ R.mT, full_matrices=False)
    counts = singular > NEGLIGIBLE * singular.max()
    return (vectors * counts.unsqueeze(-1))[:rank] @ Q.mT


class Experts(nn.Module):
    """The experts of one linear layer.

    Args:
        A (`torch.Tensor`): (experts, r, in).
        B (`torch.Tensor`): (experts, out, r), with the scale of the adapter in it.
        top_k (`int`): Experts per token; all of them if there are fewer.
        router_rank (`int`): Singular vectors of each expert that the router compares a token with.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor, top_k: int, router_rank: int) -> None:
        super().__init__()
        self.top_k = min(top_k, len(A))
        V = torch.stack([router(a, b, router_rank) for a, b in zip(A.cpu(), B.cpu(), strict=True)])
        # Not part of the state dict: the base's checkpoint stays the base's.
        for name, tensor in (("A", A), ("B", B), ("V", V.to(A.dtype))):
            self.register_buffer(name, tensor, persistent=False)

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """w_e(x) of every expert, 0 for those not chosen: (..., in) -> (..., experts)."""
        scores = torch.einsum("...i,eki->...ek", x, self.V.to(x)).norm(dim=-1)
        best, chosen = scores.topk(self.top_k, dim=-1)
        return torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the chosen experts, (..., in) -> (..., out), at least float32.

        The factors of all experts are multiplied, and the gates select: at low rank this costs less than sorting
        tokens by expert. The factors are those of the trained adapter, so that no singular value is cut off.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            inner = torch.einsum("...i,eri->...er", x, self.A.to(x)) * self.gates(x).unsqueeze(-1)
            return torch.einsum("...er,eor->...o", inner, self.B.to(x))


def add_experts(layer: nn.Module, experts: Experts) -> torch.utils.hooks.RemovableHandle:
    """Let a linear layer add what its experts say, in every call until the handle is removed."""
    # Of an offloaded layer the weight is on no device until it is called.
    layer.smile = experts if layer.weight.is_meta else experts.to(layer.weight.device)
    return layer.register_forward_hook(_add)


def _add(layer: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """The output of the layer and its experts, summed in at least float32 and rounded once."""
    return (output + layer.smile(args[0]).to(output.device)).to(output.dtype)


@functools.cache
def _named_smile(base: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """The configuration class of the base under another name: no auto class may load the base alone by it."""
    return type("SmileConfig", (base,), {"model_type": "smile", "__module__": __name__})


class SmileConfig(PretrainedConfig):
    """Everything the base's configuration says, and how the mixture is routed (`smile`)."""

    model_type = "smile"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        base = transformers.CONFIG_MAPPING[config_dict["smile"]["model_type"]]
        return _named_smile(base).from_dict(config_dict, **kwargs)


class SmileModel(PreTrainedModel):
    """Builds the base's own class, with experts in its layers."""

    config_class = SmileConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        config = config or SmileConfig.from_pretrained(pretrained_model_name_or_path)
        routing, plain = config.smile, copy.deepcopy(config)
        # The base as it was: some models ask for the name of their own configuration.
        plain.__class__ = transformers.CONFIG_MAPPING[routing["model_type"]]
        del plain.auto_map, plain.smile
        plain.architectures = routing["architectures"]
        auto, known = getattr(transformers, routing["auto_class"]), ("revision", "token", "cache_dir", "subfolder")
        found = {key: kwargs[key] for key in (*known, "local_files_only") if kwargs.get(key) is not None}
        model = auto.from_pretrained(pretrained_model_name_or_path, *args, config=plain, **kwargs)
        file = cached_file(pretrained_model_name_or_path, EXPERTS, **found)
        with safe_open(file, framework="pt") as tensors:
            for name in routing["layers"]:
                factors = (tensors.get_tensor(f"{name}.{part}") for part in ("A", "B"))
                add_experts(model.get_submodule(name), Experts(*factors, routing["top_k"], routing["router_rank"]))
        save, written = model.save_pretrained, copy.deepcopy(config)

        def save_pretrained(folder, *args, **kwargs):
            save(folder, *args, **kwargs)
            written.save_pretrained(folder)
            for name, source in ((EXPERTS, file), (CODE, __file__)):
                # Read before it is written: the folder may be the one that the model came from.
                (Path(folder) / name).write_bytes(Path(source).read_bytes())

        model.save_pretrained = save_pretrained
        return model
