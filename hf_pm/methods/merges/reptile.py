"""A step towards the trained weights that gets shorter with every task."""

from ..contract import Ended, Merged, Setting
from .coefficients import Coefficient


class Reptile(Coefficient):
    """The outer update of MMKDDA (Han and Liu 2022, arXiv 2209.06107), which is that of Reptile (Nichol et al. 2018,
    arXiv 1803.02999): theta <- theta + gamma_t (theta' - theta), theta' the trained weights; here once a task.

    gamma_t = t^-`reptile_power`, so that 1 is running model averaging and 0 keeps every update whole. Keeps nothing: t
    is the length of the ledger. Default: the paper says that the rate depends on the number of tasks seen; the form
    and the power are ours.
    """

    rule = "reptile"
    settings = {"reptile_power": Setting(1.0, "must be at least 0", lambda value: value >= 0)}

    def solve(self, ended: Ended) -> Merged:
        return Merged(ended.number ** -self["reptile_power"])
