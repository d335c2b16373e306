"""The untouched checkpoint that all merged models are rebuilt from, and where in it each adapted weight is."""

import copy
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..store.disk import whole
from ..store.ledger import sha256_file
from ..store.tensorfiles import Stored, read_header, read_tensor
from .adapters import ADAPTER, base_weight, is_experts, lora_layers, quantized, quantized_to
from .sharding import is_sharded, whole_weight


logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Piece(NamedTuple):
    """A matrix of the base files, and which part of a live weight it is.

    Most live weights are one stored tensor. Experts may be fused in the live model (experts, out, in) but stored one
    by one, gate apart from up, or transposed.

    `stored`: name of the tensor in the base. `index`: which matrix of it, if it has three dimensions. `expert`: which
    matrix of the live weight, if that has three. `rows`, `columns`: the part of that matrix. `transposed`: whether the
    stored matrix is the transpose of that part.
    """

    stored: str
    index: int | None  # type: ignore[assignment]  # a field, in place of `tuple.index`
    expert: int | None
    rows: tuple[int, int]
    columns: tuple[int, int]
    transposed: bool

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of a live weight, in the orientation of the stored matrix; a view."""
        matrix = weight if self.expert is None else weight[self.expert]
        part = matrix[slice(*self.rows), slice(*self.columns)]
        return part.T if self.transposed else part

    def factors(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of this part of left @ right, which has the shape of the live weight."""
        if self.expert is not None:
            left, right = left[self.expert], right[self.expert]
        left, right = left[slice(*self.rows)], right[:, slice(*self.columns)]
        if self.transposed:
            left, right = right.T, left.T
        return left.contiguous(), right.contiguous()


class BaseCheckpoint:
    """The untouched safetensors checkpoint that all merged models are rebuilt from.

    Args:
        folder (`Path`): With `model.safetensors` or a sharded checkpoint and its index.
        model_id (`str`): What the user calls it: a Hub id or a path.
        revision (`str`, *optional*): Commit on the Hub.

    Raises:
        UserError: If the folder holds no safetensors weights, or they are not whole.
    """

    def __init__(self, folder: str | Path, model_id: str | None = None, revision: str | None = None) -> None:
        self.folder = Path(folder)
        self.model_id = model_id or str(folder)
        self.revision = revision
        listed: dict[str, str] = {}
        if (self.folder / "adapter_config.json").is_file():
            # transformers would load the base that this file names, whatever else is there.
            raise UserError(f"{self.model_id!r} is an adapter, not a model. Name the base that it was trained on.")
        if (self.folder / INDEX).is_file():
            listed = self._read_index()
            self.files = sorted(set(listed.values()))
        elif (self.folder / SINGLE).is_file():
            self.files = [SINGLE]
        else:
            raise UserError(
                f"{self.model_id!r} holds no safetensors weights ({SINGLE} or {INDEX}). Convert the checkpoint with "
                "`from_pretrained(...).save_pretrained(...)` first."
            )
        self.headers: dict[str, dict[str, Stored]] = {}
        self._file_of: dict[str, str] = {}
        for file in self.files:
            if Path(file).name != file or not (self.folder / file).is_file():
                raise UserError(
                    f"{INDEX} of {self.model_id!r} names the file {file!r}, which is not in its folder. Get the whole "
                    "checkpoint."
                )
            self.headers[file] = read_header(self.folder / file).tensors
            for name in self.headers[file]:
                if self._file_of.setdefault(name, file) != file:
                    raise UserError(
                        f"{name!r} of {self.model_id!r} is both in {self._file_of[name]!r} and in {file!r}. Get the "
                        "checkpoint anew."
                    )
        for name, file in listed.items():
            if self._file_of.get(name) != file:
                raise UserError(
                    f"{INDEX} of {self.model_id!r} says that {name!r} is in {file!r}, which does not hold it. Get the "
                    "whole checkpoint."
                )

    def _read_index(self) -> dict[str, str]:
        try:
            listed = dict(json.loads((self.folder / INDEX).read_text())["weight_map"])
            if not all(isinstance(file, str) for file in listed.values()):
                raise TypeError("a file name is not text")
            return listed
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{INDEX} of {self.model_id!r} cannot be read ({type(error).__name__}: {error}). Get the whole "
                "checkpoint."
            ) from error

    @classmethod
    def resolve(cls, model_name_or_path: str, revision: str | None = None, code: bool = False) -> "BaseCheckpoint":
        """The checkpoint of a folder or of a Hub id (from the cache, or downloaded).

        Args:
            model_name_or_path (`str`): Folder or Hub id.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
            code (`bool`, *optional*, defaults to `False`): Download the Python files that come with it, too.

        Raises:
            UserError: If there is neither a folder nor a reachable repo of that name.
        """
        if Path(model_name_or_path).is_dir():
            return cls(model_name_or_path)
        try:
            folder = snapshot_download(
                model_name_or_path,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", *(["*.py"] if code else [])],
                # The same weights once more, in somebody else's format.
                ignore_patterns=["consolidated*", "original/*"],
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"There is no folder {model_name_or_path!r}, and it cannot be had from the Hub: {reason} Correct "
                "`model_name_or_path`, or download the model first."
            ) from error
        return cls(folder, model_name_or_path, Path(folder).name)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def where(self, name: str, index: int | None = None) -> tuple[Path, Stored]:
        """The file of a tensor and its place there; of the matrix `index` of a tensor with three dimensions."""
        file = self._file_of[name]
        stored = self.headers[file][name]
        if index is not None:
            size = (stored.end - stored.begin) // stored.shape[0]
            begin = stored.begin + index * size
            stored = Stored(stored.dtype, stored.shape[1:], begin, begin + size)
        return self.folder / file, stored

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or one matrix of it, as stored."""
        return read_tensor(*self.where(name, index))

    def identity(self) -> dict[str, object]:
        """Identity of the base: sha256 of every weight file."""
        return {
            "model": self.model_id,
            "revision": self.revision,
            "sha256": {file: sha256_file(self.folder / file) for file in self.files},
        }


Names = Mapping[str, str | Sequence[Piece]]


def stored_names(model: nn.Module, base: BaseCheckpoint) -> dict[str, str | tuple[Piece, ...]] | None:
    """Adapted matrix -> where its weight is in the base files, or `None` if some live weight is not the stored one.

    Live models carry or lack a prefix that the files lack or carry (`bert.`, `model.`), so both are tried; what counts
    is that the stored values, cast to the live dtype, are the live values. Quantized weights are compared by name.
    What goes by another name or is stored in pieces (fused experts) is found by its values.

    Of a sharded model one matrix at a time is gathered.

    Returns:
        `dict`: The name of the tensor, or its pieces.

    Raises:
        UserError: If the files hold quantized values of an adapted matrix.
    """
    names: dict[str, str | tuple[Piece, ...]] = {}
    numbered = defaultdict(list)
    for header in base.headers.values():
        for tensor in header:
            numbered[_numbers(tensor)].append(tensor)
    for name, layer in lora_layers(model).items():
        weight = whole_weight(base_weight(layer).detach())
        own = name if is_experts(layer) else f"{name}.weight"
        prefix = getattr(getattr(model, "base_model", model), "model", model).base_model_prefix
        candidates = (own, own.partition(".")[2], f"{prefix}.{own}")
        stored = next((candidate for candidate in candidates if candidate in base), None)
        if stored is not None and not base.where(stored)[1].dtype.is_floating_point:
            raise UserError(
                f"{base.model_id!r} holds {stored!r} in quantized form. Name the full-precision checkpoint it was "
                "made from, and quantize it while loading (`load_in_4bit` or `load_in_8bit`)."
            )
        pieces: str | tuple[Piece, ...] | None
        if quantized_to(layer) is not None:
            pieces = stored
        elif stored is not None and _same(weight, base, stored, None):
            pieces = stored
        else:
            pieces = _pieces(name, weight.cpu(), base, numbered)
        if pieces is None:
            return None
        names[name] = pieces
    return names


def _numbers(name: str) -> tuple[int, ...]:
    """The layer and expert numbers in a tensor's name."""
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _same(live: torch.Tensor, base: BaseCheckpoint, stored: str, index: int | None) -> bool:
    if base.where(stored, index)[1].shape != live.shape:
        return False
    return torch.equal(base.read(stored, index).to(live.dtype), live.cpu())


def _pieces(
    name: str, weight: torch.Tensor, base: BaseCheckpoint, numbered: Mapping[tuple[int, ...], list[str]]
) -> tuple[Piece, ...] | None:
    """How stored matrices make up a live weight (out, in) or (experts, out, in).

    Their names have the numbers of its layer, and of the expert unless they hold all experts; their values say which
    part of the live matrix they are. `None` if they leave a gap, or if two matrices would fit at one place.
    """
    numbers = _numbers(name)
    pieces: list[Piece] = []
    for expert in range(len(weight)) if weight.ndim == 3 else (None,):
        candidates: list[tuple[str, int | None]] = []
        if expert is not None:
            candidates += [(stored, None) for stored in numbered.get((*numbers, expert), ())]
        candidates += [(stored, expert) for stored in numbered.get(numbers, ())]
        matrices = {
            (stored, index): base.where(stored, index)[1].shape
            for stored, index in candidates
            if len(base.where(stored)[1].shape) == (2 if index is None else 3)
            and (index is None or base.where(stored)[1].shape[0] == len(weight))
        }
        laid = _lay(weight, expert, base, matrices, down=True) or _lay(weight, expert, base, matrices, down=False)
        if laid is None:
            return None
        pieces += laid
    return tuple(pieces)


def _lay(
    weight: torch.Tensor,
    expert: int | None,
    base: BaseCheckpoint,
    matrices: Mapping[tuple[str, int | None], tuple[int, ...]],
    down: bool,
) -> list[Piece] | None:
    """One live matrix as stored matrices, one below the other (`down`) or side by side."""
    height, width = weight.shape[-2:]
    laid: list[Piece] = []
    position = 0
    while position < (height if down else width):
        fitting = []
        for (stored, index), shape in matrices.items():
            for transposed in (False, True):
                rows, columns = reversed(shape) if transposed else shape
                top, left = (position, 0) if down else (0, position)
                piece = Piece(stored, index, expert, (top, top + rows), (left, left + columns), transposed)
                spans = columns == width if down else rows == height
                if spans and (rows if down else columns) and _same(piece.of(weight), base, stored, index):
                    fitting.append(piece)
        if len(fitting) != 1:
            return None
        laid.append(fitting[0])
        position = fitting[0].rows[1] if down else fitting[0].columns[1]
    return laid


def snapshot_base(model: PeftModel, folder: Path) -> None:
    """Save the base weights under the adapter of `model` as the base of a run.

    For models that have no checkpoint of their own or differ from it. `folder` appears whole or not at all.

    Of a quantized classifier the checkpoint is read again in full precision, into host memory; the head that was made
    for the run is the live one.

    Raises:
        UserError: If the model is quantized and its full-precision weights are nowhere.
    """
    if is_sharded(model):
        raise UserError(
            "The live model is sharded and no stored checkpoint, so that its weights would have to be gathered to be "
            "saved. Save it first (`save_pretrained`), and name that folder."
        )
    logger.warning("The live model is not a stored checkpoint: its weights are saved once to %s.", folder)
    inner = model.get_base_model()
    weights = {}
    for key, tensor in inner.state_dict().items():
        if ".lora_" not in key and ".modules_to_save." not in key:
            parts = [part for part in key.split(".") if part not in ("base_layer", "original_module")]
            weights[".".join(parts)] = tensor
    if quantized(model):
        inner, weights = _full_precision(model, weights)
    with whole(folder) as part:
        # The published layout; the live one where that mixes the entries of experts beyond recognition.
        for published in (True, False):
            shutil.rmtree(part, ignore_errors=True)
            inner.save_pretrained(part, state_dict=dict(weights), save_original_format=published)
            if stored_names(model, BaseCheckpoint(part)) is not None:
                break


def _full_precision(
    model: PeftModel, live: Mapping[str, torch.Tensor]
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The stored classifier under a quantized one, with what the checkpoint lacks from `live`, and its weights."""
    inner = model.get_base_model()
    if model.peft_config[ADAPTER].task_type != "SEQ_CLS" or not inner.name_or_path:
        raise UserError(
            "The live model is quantized and no stored checkpoint, so that there are no full-precision weights to add "
            "updates to. Save the full-precision model first, and quantize it while loading."
        )
    base = BaseCheckpoint.resolve(inner.name_or_path, getattr(inner.config, "_commit_hash", None))
    stored_names(model, base)  # which refuses one that is quantized itself
    config = copy.deepcopy(inner.config)
    del config.quantization_config
    config.dtype = None  # that of the files, not the live one
    with torch.random.fork_rng():
        full, loaded = type(inner).from_pretrained(
            base.folder, config=config, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    return full, full.state_dict() | {key: live[key] for key in loaded["missing_keys"]}
