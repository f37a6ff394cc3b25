"""Evaluating a network's robustness: units of images, attack by attack, into a ledger."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import __version__, distributed
from holdfast.attacks.stepwise import StepwiseAttack
from holdfast.errors import HoldfastError
from holdfast.evaluation import fingerprint, flags, probes, results
from holdfast.evaluation.estimate import Estimate
from holdfast.evaluation.inputs import Inputs, as_inputs, check_logits, chosen
from holdfast.evaluation.ledger import Ledger
from holdfast.evaluation.networks import Deciding, Searching, Speed
from holdfast.evaluation.protocols import Options, Protocol, adaptations, named
from holdfast.evaluation.pursuit import Pursuit, Rules
from holdfast.evaluation.unit import Unit, rows_of
from holdfast.keyed_random import Key
from holdfast.progress_display import Display
from holdfast.runs.files import read_json, write_json, write_text
from holdfast.threat import ThreatModel

PROBED = 64


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        summary: Accuracies with intervals, what each attack broke, passes, flags; what summary.json holds.
        rows: One mapping an image; what ledger.jsonl holds.
        flags: What speaks against quoting the number.
        path: The folder, or None.
        log: Plain text that can be pasted into an issue.
    """

    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    flags: Sequence[flags.Flag]
    path: Path | None
    log: str
    ledger: Ledger = field(repr=False)

    @property
    def robust_accuracy(self) -> float:
        """Share of images that are classified correctly and that no attack broke."""
        return float(self.summary["robust_accuracy"])

    @property
    def clean_accuracy(self) -> float:
        """Share of images that are classified correctly."""
        return float(self.summary["clean_accuracy"])

    def examples(self) -> Tensor | None:
        """The adversarial images (the clean ones where none was found), (N, C, H, W); None if they were not kept."""
        parts = [self.ledger.examples_of(number) for number in range(self._units)]
        whole = [part["x_adv"] for part in parts if part is not None]
        return torch.cat(whole) if len(whole) == len(parts) and whole else None

    @property
    def _units(self) -> int:
        return -(-len(self.rows) // int(self.ledger.protocol["unit"]))

    def __str__(self) -> str:
        return results.in_words(self.summary)


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

    def describe(self, classes: int) -> dict[str, Any]:
        """What the ledger is about; another one is refused in its folder.

        Args:
            classes: K.
        """
        inputs = self.inputs
        return {
            "format": 1,
            "version": __version__,
            "attack": self.protocol.label,
            "attacks": [attack.name for attack in self.protocol.attacks],
            "settings": [_settings(attack) for attack in self.protocol.attacks],
            "notes": adaptations(self.protocol, classes),
            "threat": self.threat.norm,
            "epsilon": self.threat.epsilon,
            "seed": self.seed,
            "n": len(inputs.y),
            "unit": self.unit,
            "precision": self.speed.precision,
            "model": fingerprint.of_model(self.model),
            "data": fingerprint.of_images(*inputs.whole),
            "classes": list(inputs.names),
            "carried": self.carried.summary["epsilon"] if self.carried is not None else None,
            "model_name": inputs.model_name,
            "data_name": inputs.data_name,
            "about": dict(inputs.about),
        }

    def run(self) -> Result:
        """All units that are not yet done, by all processes, then the summary."""
        if isinstance(self.unit, bool) or not isinstance(self.unit, int) or self.unit < 1:
            raise HoldfastError(f"unit is {self.unit!r}: give a whole number of images, at least 1")
        state = [(module, module.training) for module in self.model.modules()]
        with torch.random.fork_rng(devices=_devices(self.inputs.device)):
            logits = Deciding(self.model, self.speed.batch_size)(self.inputs.part(slice(0, 8))[0])
        check_logits(logits, self.inputs.y)
        ledger = Ledger(self.path, self.describe(logits.shape[1]))
        try:
            ledger.open(writes=distributed.rank() == 0)
            distributed.barrier()
            with torch.random.fork_rng(devices=_devices(self.inputs.device)):
                raised = self._probed(ledger)
                if not ledger.finished:
                    self._units(ledger, randomised=any(flag.name == "randomised" for flag in raised))
            return self._result(ledger, raised)
        finally:
            for module, training in state:
                module.training = training
            self.display.stop()
            ledger.close()

    def _probed(self, ledger: Ledger) -> list[flags.Flag]:
        """Flags that can be raised before an attack, from what was found when the evaluation began."""
        if not self.probe:
            return []
        file = None if ledger.path is None else ledger.path / "probes.json"
        if file is not None and file.is_file():
            return [flags.Flag(**found) for found in read_json(file)["flags"]]
        x, y, index = self.inputs.part(slice(0, PROBED))
        key = Key(self.seed).fold("probes")
        torch.manual_seed(key.torch_seed)
        raised = probes.probe(self.model, x, y, self.threat, key=key, index=index)
        distributed.barrier()
        if file is not None and distributed.rank() == 0:
            write_json(file, {"flags": [flags.as_dict(flag) for flag in raised]})
        return raised

    def _units(self, ledger: Ledger, *, randomised: bool) -> None:
        """Every unit of this process that is not yet done."""
        count = -(-len(self.inputs.y) // self.unit)
        own = range(distributed.rank(), count, distributed.world_size())
        todo = [number for number in own if not ledger.has(number, examples=self.save_examples)]
        if not todo:
            return
        x = self.inputs.part(slice(0, 8))[0]
        deciding = Deciding(self.model, self.speed.batch_size)
        searching = Searching(self.model, x, self.speed, randomised=randomised)
        images = sum(len(self.inputs.y[self._slice(number)]) for number in todo)
        self.display.work(f"{self.protocol.label}, {self.threat}", images)
        estimate = Estimate(self.protocol.attacks, deciding(x).shape[1], images)
        for number in todo:
            torch.manual_seed(Key(self.seed).fold("unit", number).torch_seed)
            started = time.monotonic()
            unit = self._unit(number, deciding)
            for place in range(len(self.protocol.attacks)):
                self._attack(unit, place, deciding, searching, estimate)
            seconds = (time.monotonic() - started) / len(unit.y)
            rows = rows_of(unit, self.protocol.attacks, seconds, deciding)
            examples = {"x": unit.x, "x_adv": unit.example, "y": unit.y, "index": unit.index}
            ledger.write(number, rows, examples if self.save_examples else None)
            estimate.done_images += len(unit.y)
            self.display.advance(len(unit.y))

    def _slice(self, number: int) -> slice:
        return slice(number * self.unit, (number + 1) * self.unit)

    def _unit(self, number: int, deciding: Deciding) -> Unit:
        """A unit before its first attack; what a smaller epsilon broke is broken."""
        x, y, index = self.inputs.part(self._slice(number))
        unit = Unit(x, y, index, deciding(x))
        if self.carried is not None:
            before = self.carried.rows[self._slice(number)]
            examples = self.carried.ledger.examples_of(number)
            assert examples is not None  # a curve saves them
            unit.carry(before, examples["x_adv"].to(x.device), self.carried.summary["epsilon"])
        return unit

    def _attack(self, unit: Unit, place: int, deciding: Deciding, searching: Searching, estimate: Estimate) -> None:
        """One attack on one unit."""
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
        pursuit = Pursuit(attack, unit, deciding, searching, rules, number=place, batch_size=self.speed.batch_size)

        def tell(passes: int, jobs_left: int, jobs: int) -> None:
            estimate.done_passes += passes
            estimate.attack(place, int(unit.robust.sum()), jobs_left, jobs)
            self.display.note(attack.name, estimate.seconds_left)

        pursuit.run(tell)

    def _result(self, ledger: Ledger, raised: Sequence[flags.Flag]) -> Result:
        """Merge what all processes found, and write the summary."""
        distributed.barrier()
        protocol = ledger.protocol
        if ledger.path is None:
            for kept in distributed.gather_objects(ledger.kept):
                ledger.kept.update(kept)
        count = -(-len(self.inputs.y) // self.unit)
        if distributed.rank() == 0 or ledger.path is None:
            rows = ledger.merged(count)
        distributed.barrier()
        if not (distributed.rank() == 0 or ledger.path is None):
            rows = ledger.merged(count)
        every = [*raised, *(flags.from_rows(rows, threat=self.threat) if self.probe else [])]
        told = [flags.as_dict(flag) for flag in every]
        summary = results.summarize(rows, protocol, told)
        summary = {**summary, "about": protocol["about"], "notes": protocol["notes"]}
        log = results.log(summary, protocol) + "".join(f"note: {note}\n" for note in protocol["notes"])
        if ledger.path is not None and distributed.rank() == 0:
            write_json(ledger.path / "flags.json", {"flags": told})
            write_json(ledger.path / "summary.json", summary)
            write_text(ledger.path / "images.csv", results.images_csv(rows))
            write_text(ledger.path / "log.txt", log)
        return Result(summary, rows, every, ledger.path, log, ledger)


def evaluate(
    model: nn.Module,
    images: Any,
    labels: Tensor | None = None,
    *,
    threat: ThreatModel,
    attack: str | Protocol = "autoattack",
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
        model: Any module from pixels in [0, 1] to logits. Nothing of it is changed.
        images: (N, C, H, W) in [0, 1] as floats or 0 … 255 as uint8; or a `holdfast.data.images.Images`; or anything
            that yields pairs of images and labels, such as a `DataLoader`.
        labels: (N,), with tensors.
        threat: The ball, for example ``Linf("8/255")``.
        attack: A name (``holdfast list attacks``), several with commas, or a `Protocol`.
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
        HoldfastError: images, labels or settings cannot be used, or the folder holds another evaluation.

    Example:
        >>> from holdfast.threat import Linf
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> x, y = torch.rand(8, 1, 2, 2), torch.zeros(8).long()
        >>> found = evaluate(model, x, y, threat=Linf(0.1), attack="pgd", probe=False)
        >>> found.robust_accuracy <= found.clean_accuracy
        True
    """
    inputs = chosen(as_inputs(model, images, labels), n)
    protocol = attack if isinstance(attack, Protocol) else named(attack, threat, options)
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


def _settings(attack: StepwiseAttack) -> str:
    """An attack with all its settings; of another network its weights' hash."""
    source = getattr(attack, "source", None)
    return repr(attack) + (f" of weights {fingerprint.of_model(source)}" if isinstance(source, nn.Module) else "")


def _devices(device: torch.device) -> Iterable[torch.device]:
    """Accelerators whose generators are put back."""
    return [device] if device.type == "cuda" else []
