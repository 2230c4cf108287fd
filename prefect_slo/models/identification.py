"""Whether a stage has been measured at enough settings to plan it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefect_slo.errors import NotEnoughObservations
from prefect_slo.models.history import History, knob_label
from prefect_slo.models.transfer import nearest_share
from prefect_slo.resources import Menu

_ROWS = 4
"""Two repeats at two settings: the least that tells noise from effect."""


@dataclass(frozen=True)
class Identification:
    """A verdict that is true when the stage can be planned.

    Attributes:
        stage: Stage judged.
        have: Usable observations.
        need: Observations needed.
        reason: What is missing, or why it is enough.
    """

    stage: str
    have: int
    need: int
    reason: str

    def __bool__(self) -> bool:
        return self.have >= self.need

    def require(self) -> None:
        """Do nothing when it can be planned.

        Raises:
            NotEnoughObservations: It can't.
        """
        if not self:
            raise NotEnoughObservations(self.stage, self.have, self.need, self.reason)


def identify(stage: str, menu: Menu, history: History | None) -> Identification:
    """Judge a stage: four observations, and two settings of every dimension in which its menu leaves a choice.

    A menu dimension of one value needs no variation; a pool or knob that was never measured needs some rows.
    """
    have = 0 if history is None else len(history)
    if history is None or have < _ROWS:
        return Identification(stage, have, _ROWS, "Profile it with 'prefect-slo profile', or run the flow more often.")
    options = menu.options()
    for column, wanted in (
        ("workers", {o.workers for o in options}),
        ("vcpus", {round(o.size.vcpus, 3) for o in options}),
        ("batch", {o.batch for o in options}),
    ):
        seen = np.unique(history[column].round(3))
        if len(wanted) > 1 and len(seen) < 2:
            hint = (
                f"Its menu offers {len(wanted)} values of {column}, and only {seen[0]:g} was measured: profile others."
            )
            return Identification(stage, have, have + 1, hint)
    measured = set(history.hardware.tolist())
    shares = {o.size.kind for o in options if 0 < o.size.gpu < 1 and nearest_share(o.size.kind, measured)}
    unseen = {o.size.kind for o in options} - measured - shares
    if unseen == {o.size.kind for o in options}:
        return Identification(
            stage, have, have + 1, f"Nothing was measured on {', '.join(sorted(unseen))}: profile it."
        )
    unseen = {knob_label(o.knobs) for o in options} - set(history.knobs.tolist())
    if menu.knobs and len(unseen) == len({o.knobs for o in options}):
        return Identification(stage, have, have + 1, f"Nothing was measured with {sorted(unseen)[0]}: profile it.")
    return Identification(stage, have, _ROWS, f"{have} observations cover every dimension of its menu.")
