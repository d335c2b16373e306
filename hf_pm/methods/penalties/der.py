"""Dark experience replay: kept rows with the logits that the model had for them when their task ended."""

from itertools import accumulate

import torch
from torch.nn.functional import mse_loss

from ..contract import Ended, Penalty, Setting, Step, Task
from ..replay import FRACTION, carried, choose_rows
from ..rows_state import RowsState, answer_lengths, chunks


class Der(RowsState, Penalty):
    """DER++ (Buzzega et al. 2020, arXiv 2004.07211).

    loss + `der_alpha` * MSE(z, z_old) + `der_beta` * CE, on two separate draws from the kept rows. z_old are the
    logits of the trained model before its merge, in evaluation mode, at the answer tokens of the rows kept when their
    task ended: the `der_top_k` largest at each, float32, and their positions in the vocabulary. MSE is the mean over
    answer tokens and stored logits. `der_beta: 0` is DER. With `replay: buffer` kept rows are rows of the batches as
    well, which a `replay_share` of s weighs like beta = s / (1 - s). Costs a forward and backward pass for each of the
    two draws. Keeps these logits, which grow with the rows. Defaults: 0.2 and 0.5 are those of the authors' code for
    CIFAR-10 and Tiny ImageNet with 500 kept rows; 64 logits (the paper keeps all, of few classes) are ours.
    """

    name = "der"
    anchored = False
    uses_rows_for = "compares answers to rows of earlier tasks with what was answered then"
    settings = {
        "replay_fraction": FRACTION,
        "der_alpha": Setting(0.2, "must be at least 0", lambda value: value >= 0),
        "der_beta": Setting(0.5, "must be at least 0", lambda value: value >= 0),
        "der_top_k": Setting(64, "must be a whole number of at least 1", lambda v: v >= 1 and v == int(v)),
    }
    cost = {
        "step": "two forward and backward passes over drawn rows",
        "end": "one forward pass over the rows that are kept",
    }
    runs_model = True
    growth = "8 bytes for each of `der_top_k` logits at each answer token of a kept row"

    def begin(self, task: Task) -> None:
        super().begin(task)
        if self.rows is None:
            return
        values, indices = task.before.beside("der_values"), task.before.beside("der_indices")
        self.values, self.indices = (torch.cat([kept[name] for name in self.kept]) for kept in (values, indices))
        self.ends = list(accumulate(answer_lengths(self.rows), initial=0))

    def loss(self, step: Step) -> torch.Tensor | None:
        if self.rows is None:
            return None
        drawn = self.draw(step, "der", len(self.rows))
        tokens = torch.cat([torch.arange(self.ends[row], self.ends[row + 1]) for row in drawn])
        logits, _ = self.logits(self.rows.select(drawn))
        old, where = self.values[tokens].to(logits.device), self.indices[tokens].long().to(logits.device)
        repeated = self.rows.select(self.draw(step, "der++", len(self.rows)))
        return self["der_alpha"] * mse_loss(logits.gather(1, where), old) + self["der_beta"] * self.cross_entropy(
            repeated
        )

    @torch.no_grad()
    def end(self, ended: Ended) -> dict[str, torch.Tensor]:
        rows = ended.train_rows.select(choose_rows(ended, self["replay_fraction"]).tolist())
        values, indices = [], []
        for batch in chunks(rows, self.args.per_device_eval_batch_size):
            logits, _ = self.logits(batch)
            top = logits.topk(min(int(self["der_top_k"]), logits.shape[1]))
            values.append(top.values.cpu())
            indices.append(top.indices.int().cpu())
        return carried(ended, "der_values", "der_indices") | {
            f"der_values/{ended.name}": torch.cat(values),
            f"der_indices/{ended.name}": torch.cat(indices),
        }
