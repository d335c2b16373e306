"""A step towards the trained weights that gets shorter with every task."""

from ..contract import Ended, Merged, Setting
from .coefficients import Coefficient


class Reptile(Coefficient):
    """The outer update of MMKDDA, once a task: theta <- theta + gamma_t (theta' - theta), theta' the trained weights.

    gamma_t = t^-`reptile_power`, so that 1 is running model averaging and 0 keeps every update whole. The paper says
    that the rate depends on the number of tasks seen; the form is ours.
    """

    rule = "reptile"
    settings = {"reptile_power": Setting(1.0, "must be at least 0", lambda value: value >= 0)}

    def solve(self, ended: Ended) -> Merged:
        return Merged(ended.number ** -self["reptile_power"])
