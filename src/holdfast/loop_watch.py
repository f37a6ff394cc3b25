"""What the loop does about catastrophic overfitting."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.catastrophic_overfitting import snapshot
from holdfast.data.loader import to_pixels
from holdfast.evaluation.accuracy import choose
from holdfast.forward import View
from holdfast.runs.state import restore_training, training_state

if TYPE_CHECKING:
    from holdfast.loop import Loop

GUARDED = 128  # held-out images on which catastrophic overfitting is looked for
ROLLBACKS = 3  # after so many a run that overfits again is stopped
ADVICE = {
    "warn": "; train by N-FGSM or with smaller steps, or set --training.catastrophic_overfitting stop or rollback",
    "stop": "; the run stops here, the best weights so far are kept",
    "rollback": "; the run goes back to where it still held",
}


def watch(loop: Loop) -> None:
    """Look for catastrophic overfitting now and then, at every epoch's end too, and do what the settings say."""
    done = loop.epoch * len(loop.loader) + loop.position
    due = done % loop.settings.overfitting_check == 0 or loop.position == len(loop.loader)
    if loop.response == "off" or loop.progress().warming_up or not due:
        return
    known = loop.guard.found
    images = loop.setup.validation
    rows = choose(images, GUARDED)  # drawn: the first ones may be of one class
    x, y = to_pixels(images.pixels[rows], loop.loader.dtype), images.labels[rows]
    branches = getattr(loop.step, "branches", {})
    found = loop.guard.look(View(loop.model, branch=branches.get("adv", "main")), x, y, loop.recipe.threat)
    if not found:
        if loop.response == "rollback" and not loop.guard.suspected:
            loop.guard.good = snapshot(training_state(loop))
        return
    goes_back = loop.response == "rollback" and loop.guard.good is not None and loop.guard.rollbacks < ROLLBACKS
    if not known:
        done_about_it = "stop" if loop.response == "rollback" and not goes_back else loop.response
        loop.display.say(loop.guard.message(loop.epoch + 1) + ADVICE[done_about_it])
    if goes_back:
        restore_training(loop, snapshot(loop.guard.good))  # type: ignore[arg-type]  # not None, by goes_back
        loop.guard.rollbacks += 1
        loop.guard.found = loop.guard.suspected = False
    elif loop.response in ("stop", "rollback"):
        loop.stopped = True
