"""Evaluating a network's robustness: units of images, attack by attack, into a ledger."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import __version__, distributed
from holdfast.attacks.stepwise import StepwiseAttack
from holdfast.errors import HoldfastError
from holdfast.evaluation import fingerprint, flags, probes, sight
from holdfast.evaluation.estimate import Estimate
from holdfast.evaluation.inputs import Inputs, as_inputs, check_logits, chosen
from holdfast.evaluation.landmarks import Landmarks
from holdfast.evaluation.ledger import PROTOCOL, Ledger
from holdfast.evaluation.networks import Deciding, Searching, Speed
from holdfast.evaluation.paths import undisturbed
from holdfast.evaluation.probed_model import left_as_it_was
from holdfast.evaluation.protocols import Options, Protocol, adaptations, protocol_of
from holdfast.evaluation.pursuit import Pursuit, Rules
from holdfast.evaluation.result import Result as Result
from holdfast.evaluation.result import conclude
from holdfast.evaluation.unit import Unit, rows_of
from holdfast.evaluation.watch import Watch
from holdfast.interruption import Interruption, Stopped
from holdfast.keyed_random import Key, permutation
from holdfast.models.adapted import for_evaluation
from holdfast.models.outputs import noticed
from holdfast.progress_display import Display
from holdfast.runs.files import read_json, write_json
from holdfast.runs.lock import locked
from holdfast.threat import ThreatModel

PROBED, TRIED, OUTPUTS = 64, 8, 100


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that an evaluation goes by; `run` does it. `evaluate` is the short way.

    Args:
        model: Pixels in [0, 1] to logits.
        inputs: Images and labels.
        threat: The ball.
        protocol: The attacks.
        seed: Of all draws.
        unit: Images that are worked on together; a kill costs at most one such unit.
        speed: How the search may save time.
        path: The folder of the ledger, or None.
        save_examples: Keep every image's example.
        probe: Look for signs of a broken evaluation first.
        carried: The result of a smaller epsilon: what it broke counts as broken.
        display: Where progress is shown.
    """

    model: nn.Module
    inputs: Inputs
    threat: ThreatModel
    protocol: Protocol
    seed: int = 0
    unit: int = 250
    speed: Speed = field(default_factory=Speed)
    path: Path | None = None
    save_examples: bool = False
    probe: bool = True
    carried: Result | None = None
    display: Display = field(default_factory=Display)

    def describe(self, logits: Tensor, notes: Sequence[str] = ()) -> dict[str, Any]:
        """What the ledger is about; another one is refused in its folder.

        Args:
            logits: Of the first few images, (n, K): two networks of one structure and one state may still differ.
            notes: What should be told about the network's outputs.
        """
        inputs = self.inputs
        kind = "uint8" if inputs.x.dtype == torch.uint8 else "float32"
        return {
            "format": 1,
            "version": __version__,
            "attack": self.protocol.label,
            "attacks": [attack.name for attack in self.protocol.attacks],
            "settings": [fingerprint.of_attack(attack) for attack in self.protocol.attacks],
            "notes": [*adaptations(self.protocol, logits.shape[1]), *notes],
            "threat": self.threat.norm,
            "epsilon": self.threat.epsilon,
            "seed": self.seed,
            "n": len(inputs.y),
            "unit": self.unit,
            "precision": self.speed.precision,
            "model": fingerprint.of_model(self.model),
            "data": fingerprint.of_images(*inputs.whole),
            "images": {"as": kind, "sha256": fingerprint.of_images(inputs.x, inputs.y)},
            "outputs": [[round(value, 6) for value in row[:OUTPUTS]] for row in logits.tolist()],
            "classes": list(inputs.names),
            "smaller_epsilon": self.carried.summary["epsilon"] if self.carried is not None else None,
            "model_name": inputs.model_name,
            "data_name": inputs.data_name,
            "about": dict(inputs.about),
        }

    def run(self) -> Result:
        """All units that are not yet done, by all processes, then the summary."""
        if isinstance(self.unit, bool) or not isinstance(self.unit, int) or self.unit < 1:
            raise HoldfastError(f"unit is {self.unit!r}: give a whole number of images, at least 1")
        with ExitStack() as stack:
            stack.enter_context(distributed.others_missed())
            interruption = stack.enter_context(Interruption())
            lock = self.path and stack.enter_context(locked(self.path, kept_for=PROTOCOL))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(left_as_it_was(self.model, self.inputs.device))
            stack.callback(self.display.stop)
            logits, notes = self._first_logits()
            ledger = Ledger(self.path, self.describe(logits, notes), lock)
            self._open(ledger)
            landmarks = None if ledger.finished else self._landmarks()
            raised = self._probed(ledger)
            if not ledger.finished:
                randomised = any(flag.name == "randomised" for flag in raised)
                with interruption.finishing("this pass"):
                    classes = logits.shape[1]
                    self._units(ledger, interruption, landmarks, classes=classes, randomised=randomised)
            return self._result(ledger, raised)

    def _open(self, ledger: Ledger) -> None:
        """Rank 0 first: the others look when the folder is made."""
        with distributed.refused_together():
            if distributed.rank() == 0:
                ledger.open(writes=True)
        if distributed.rank() != 0:
            ledger.open(writes=False)
        if ledger.finished:
            look = partial(ledger.look_at_examples, self._count, wanted=self.save_examples, say=self.display.say)
            distributed.decided_by_first(look)

    def _first_logits(self) -> tuple[Tensor, list[str]]:
        """Of the first few images, (n, K), and how they were found; from the same draws whenever it is called."""
        torch.manual_seed(Key(self.seed).fold("first").torch_seed)
        x = self.inputs.part(slice(0, TRIED))[0]
        with noticed(self.model) as notes:
            logits = Deciding(self.model, self.speed.batch_size)(x)
        check_logits(logits, self.inputs.y, len(x))
        return logits, notes

    def _landmarks(self) -> Landmarks | None:
        """Points that the model is asked about before all else, to be asked about them again."""
        if not self.probe:
            return None
        x = self.inputs.part(slice(0, TRIED))[0]
        with undisturbed(self.model, x.device):
            return Landmarks(
                Deciding(self.model, self.speed.batch_size), x, self.threat, Key(self.seed).fold("landmarks")
            )

    @property
    def _count(self) -> int:
        """How many units there are."""
        return -(-len(self.inputs.y) // self.unit)

    def _probed(self, ledger: Ledger) -> list[flags.Flag]:
        """Flags that can be raised before an attack, from what was found when the evaluation began."""
        if not self.probe:
            return []
        file = None if ledger.path is None else ledger.path / "probes.json"
        if file is not None and file.is_file():
            try:
                return [flags.from_dict(found) for found in read_json(file)["flags"]]
            except (HoldfastError, LookupError, TypeError):
                self.display.say(f"{file} is damaged: it is measured again")
        key = Key(self.seed).fold("probes")
        some = permutation(key.fold("images"), len(self.inputs.y))[:PROBED].sort().values
        x, y, index = self.inputs.part(some)
        torch.manual_seed(key.torch_seed)
        raised = probes.probe(self.model, x, y, self.threat, key=key, index=index, attacks=self.protocol.attacks)
        distributed.barrier()  # by now all have looked whether the file is there
        with distributed.refused_together():
            if file is not None and distributed.rank() == 0:
                ledger.check()
                write_json(file, {"flags": [flags.as_dict(flag) for flag in raised]})
        return raised

    def _units(
        self,
        ledger: Ledger,
        interruption: Interruption,
        landmarks: Landmarks | None,
        *,
        classes: int,
        randomised: bool,
    ) -> None:
        """Work on every unit of this process that is not yet done.

        Raises:
            Stopped: it was asked to; finished units are kept.
        """

        def pause() -> None:
            if interruption.asked:
                raise Stopped(number=interruption.number)

        own = range(distributed.rank(), self._count, distributed.world_size())
        todo = [number for number in own if not ledger.has(number, examples=self.save_examples)]
        for damage in ledger.damaged:
            self.display.say(f"{damage}: these images are evaluated again")
        if not todo:
            return
        x = self.inputs.part(slice(0, TRIED))[0]
        deciding = Deciding(self.model, self.speed.batch_size)
        # where only a row's last claim is looked at, a false one of low precision would hide an earlier true one
        speed = replace(self.speed, precision="fp32") if self.protocol.at_end else self.speed
        searching = Searching(self.model, x, speed, randomised=randomised)
        if not searching.copied and distributed.rank() == 0:
            self.display.say(f"a copy of the model is not what the model is: attacks run on {searching.precise.name}")
        key = Key(self.seed).fold("watch")
        watching = Watch(searching, deciding, key, looks=self.probe and not randomised, landmarks=landmarks)
        images = sum(len(self.inputs.y[self._slice(number)]) for number in todo)
        self.display.work(f"{self.protocol.label}, {self.threat}", images)
        estimate = Estimate(self.protocol.attacks, classes, images)
        for number in todo:
            torch.manual_seed(Key(self.seed).fold("unit", number).torch_seed)
            started = time.monotonic()
            unit = self._unit(number, deciding)
            watching.begin(number)
            for place in range(len(self.protocol.attacks)):
                self._attack(unit, place, watching, estimate, pause)
            seconds = (time.monotonic() - started) / len(unit.y)
            rows = rows_of(unit, self.protocol.attacks, seconds, deciding, self.threat.epsilon)
            examples = {"x": unit.x, "x_adv": unit.example, "y": unit.y, "index": unit.index}
            seen = sight.as_dict(watching.end(len(unit.y), last=number == todo[-1]))
            ledger.write(number, rows, examples if self.save_examples else None, seen)
            estimate.done_images += len(unit.y)
            self.display.advance(len(unit.y))
            pause()

    def _slice(self, number: int) -> slice:
        return slice(number * self.unit, (number + 1) * self.unit)

    def _unit(self, number: int, deciding: Deciding) -> Unit:
        """A unit before its first attack; what a smaller epsilon broke is broken."""
        x, y, index = self.inputs.part(self._slice(number))
        unit = Unit(x, y, index, deciding(x))
        if self.carried is not None:
            before = self.carried.rows[self._slice(number)]
            examples = self.carried.ledger.examples_of(number)
            if examples is None:
                raise HoldfastError(f"{self.carried.path} has no examples to carry over: evaluate it with them first")
            unit.carry(before, examples["x_adv"].to(x.device), self.carried.summary["epsilon"])
        return unit

    def _attack(
        self,
        unit: Unit,
        place: int,
        watching: Watch,
        estimate: Estimate,
        pause: Callable[[], None],
    ) -> None:
        """Run one attack on one unit."""
        if place == 0:
            estimate.unit(len(unit.y), int(unit.robust.sum()))
        rules = Rules(
            threat=self.threat,
            key=Key(self.seed).fold("evaluation"),
            until_nearest=self.protocol.until_nearest,
            at_end=self.protocol.at_end,
            look_every=self.speed.look_every,
        )
        attack = self.protocol.attacks[place]
        pursuit = Pursuit(
            attack,
            unit,
            watching.deciding,
            watching.searching,
            rules,
            number=place,
            batch_size=self.speed.batch_size,
            watch=watching,
        )

        def tell(passes: int, jobs_left: int, jobs: int) -> None:
            estimate.done_passes += passes
            estimate.attack(place, int(unit.robust.sum()), jobs_left, jobs)
            self.display.note(attack.name, estimate.seconds_left)

        pursuit.run(tell, pause)

    def _result(self, ledger: Ledger, raised: Sequence[flags.Flag]) -> Result:
        """Merge what all processes found, and write the summary."""
        distributed.barrier()
        if ledger.path is None:
            for kept in distributed.gather_objects(ledger.kept):
                ledger.kept.update(kept)
            for seen in distributed.gather_objects(ledger.seen):
                ledger.seen.update(seen)
        with distributed.refused_together():
            if distributed.rank() == 0 or ledger.path is None:
                seen = ledger.seen_of_all(self._count)
                rows = ledger.merged(self._count, len(self.inputs.y))
        if not (distributed.rank() == 0 or ledger.path is None):
            seen = ledger.seen_of_all(self._count)
            rows = ledger.merged(self._count, len(self.inputs.y))
        if ledger.unchecked:
            self.display.say(
                f"files of {ledger.path} are used unchecked, without a .sha256 beside them (older versions wrote none)"
            )
        return conclude(ledger, rows, seen, raised, threat=self.threat if self.probe else None)


def evaluate(
    model: nn.Module,
    images: Any,
    labels: Tensor | None = None,
    *,
    threat: ThreatModel,
    attack: str | Protocol | Sequence[StepwiseAttack] = "autoattack",
    n: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    save_examples: bool = False,
    options: Options | None = None,
    speed: Speed | None = None,
    unit: int = 250,
    probe: bool = True,
) -> Result:
    """How well a network holds under attack.

    Args:
        model: Any module from pixels in [0, 1] to logits, TorchScript too. Nothing of it is changed. Of an output that
            is more than logits a part is taken; see `holdfast.models.outputs.logits_of`.
        images: (N, C, H, W) in [0, 1] as floats or 0 … 255 as uint8; or a `holdfast.data.images.Images`; or anything
            that yields pairs of images and labels, such as a `DataLoader`.
        labels: (N,), with tensors.
        threat: The ball, for example ``Linf("8/255")``.
        attack: A name (``holdfast list attacks``), several with commas, a list of attacks, or a `Protocol`.
        n: How many images, by a fixed draw that does not depend on the model; None for all.
        seed: Of all draws.
        out: A folder for the ledger; with it, a killed evaluation goes on where it was. None keeps it in memory.
        save_examples: Keep the adversarial images, so that `holdfast verify` can recount.
        options: Settings of single attacks.
        speed: How the search may save time; nothing of it decides what counts as a success.
        unit: Images that are worked on together.
        probe: Look for signs that the number cannot be believed, and flag them.

    Shapes:
        images: (N, C, H, W); labels: (N,) in [0, K).
    Units:
        Pixels in [0, 1].
    Raises:
        HoldfastError: images, labels or settings cannot be used, the folder holds another evaluation, or another
            process writes to it.
        Stopped: Ctrl-C, SIGTERM or SIGHUP, after the current pass; finished units are kept in `out`.

    Example:
        >>> from holdfast.threat import Linf
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> x, y = torch.rand(8, 1, 2, 2), torch.zeros(8).long()
        >>> found = evaluate(model, x, y, threat=Linf(0.1), attack="pgd", probe=False)
        >>> found.robust_accuracy <= found.clean_accuracy
        True
    """
    if not isinstance(model, nn.Module):
        raise HoldfastError(f"model is a {type(model).__name__}: give a torch.nn.Module from pixels to logits")
    if not isinstance(threat, ThreatModel):
        raise HoldfastError(f'threat is {threat!r}: give Linf("8/255"), L2("1/2") or L1("12/1")')
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise HoldfastError(f"seed is {seed!r}: give a whole number")
    if speed is not None and not isinstance(speed, Speed):
        raise HoldfastError(f"speed is a {type(speed).__name__}: give Speed(precision=…, batch_size=…)")
    model = for_evaluation(model)
    with torch.inference_mode(False):
        inputs = chosen(as_inputs(model, images, labels), n)
    protocol = protocol_of(attack, threat, options)
    protocol.require(threat)
    return Plan(
        model=model,
        inputs=inputs,
        threat=threat,
        protocol=protocol,
        seed=seed,
        unit=unit,
        speed=speed or Speed(),
        path=None if out is None else Path(out),
        save_examples=save_examples,
        probe=probe,
    ).run()
