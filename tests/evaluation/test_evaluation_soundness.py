"""What could make a verdict wrong without anyone noticing: each of these once did."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_robustness import EPSILON, SHORT, digits, network, short, without_time
from torch import Tensor, nn

import holdfast
from holdfast import APGD, HoldfastError, IterativeGradient, Linf, Speed, evaluate, of_attacks, recount
from holdfast.evaluation.folding import folded
from holdfast.evaluation.inputs import as_inputs, chosen
from holdfast.evaluation.protocols import Options, named
from holdfast.evaluation.robustness import PROBED
from holdfast.runs.digests import beside
from holdfast.runs.files import read_json, write_json

PGD = of_attacks([IterativeGradient(steps=10)])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


class Around(nn.Module):
    """A network with something before and after it."""

    def __init__(self, network: nn.Module, after=lambda z: z) -> None:
        super().__init__()
        self.network, self.after = network, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(x))


# ----------------------------------------------------------------------------------------------- the searching copy


class Skip(nn.Module):
    """A convolution whose output is used through a BatchNorm and past it: folding would change the network."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 5)
        self.norm.running_mean += torch.randn(4)
        self.norm.running_var *= 3
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        return self.scale * self.fc((self.norm(hidden) + hidden).flatten(1))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
def test_folding_never_changes_a_network(scale: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Skip(scale).eval(), torch.rand(4, 1, 8, 8)
    copy, count = folded(model, x)
    assert count == 0
    assert torch.equal(copy(x), model(x))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
def test_folding_folds_what_it_may(scale: float) -> None:
    subject = network(seed=2)
    subject[1].running_mean += 0.5
    with torch.no_grad():
        subject[-1].weight *= scale
        subject[-1].bias *= scale
    x = digits(6)[0]
    copy, count = folded(subject, x)
    assert count == 1
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())
    assert torch.allclose(copy(x), subject(x), rtol=1e-4, atol=1e-4 * scale)


def test_a_batchnorm_without_running_statistics_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten())
    assert folded(model.eval(), torch.rand(4, 1, 5, 5))[1] == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_views_its_features_in_a_row_is_searched(channels: int) -> None:
    """`h.view(B, -1)` cannot be had channels-last: the search must not go blind, nor crash."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(channels, 4, 3), nn.Linear(4 * 36, 5)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.conv(x).relu()
            return 5 * self.fc(hidden.view(hidden.size(0), -1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Views().eval(), torch.rand(8, channels, 8, 8)
    found = evaluate(model, x, model(x).argmax(1), threat=Linf(0.3), attack=PGD, probe=False)
    assert found.robust_accuracy < 0.5


def test_what_cannot_be_copied_is_searched_as_it_is(model: nn.Module) -> None:
    class Uncopied(Around):
        def __deepcopy__(self, memo: dict) -> None:
            raise ValueError("no copy of me")

    one, two = short(Uncopied(model), attack=PGD, count=20), short(model, attack=PGD, count=20)
    assert [row["verdict"] for row in one.rows] == [row["verdict"] for row in two.rows]
    assert one.robust_accuracy < one.clean_accuracy


# ------------------------------------------------------------------------------------------- surroundings of the call


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_surroundings_do_not_blind_the_search(model: nn.Module, around) -> None:
    outside = short(model, attack=PGD, count=20)
    with around():
        inside = short(model, attack=PGD, count=20)
    assert [row["verdict"] for row in inside.rows] == [row["verdict"] for row in outside.rows]


def test_autocast_around_the_call_does_not_decide(model: nn.Module) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = short(model, attack=PGD, count=20, save_examples=True)
    held = model(found.examples()).argmax(1) == digits(20)[1]
    assert [row["verdict"] == "robust" for row in found.rows] == held.tolist()


def test_buffers_and_other_generators_are_left_alone(model: nn.Module, tmp_path: Path) -> None:
    """A forward that counts its calls and draws from Python and NumPy: its evaluation can go on and be verified."""

    class Counts(Around):
        def __init__(self, network: nn.Module) -> None:
            super().__init__(network)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            random.random()
            np.random.rand()  # noqa: NPY002 - what is tested
            return self.network(x)

    subject = Counts(model)
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 - what is tested
    for _ in range(2):
        short(subject, attack=PGD, count=12, out=tmp_path / "e", save_examples=True)
    assert float(subject.calls) == 0
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002 - as above
    assert not recount(tmp_path / "e", subject)["differing"]


def test_logits_that_are_not_finite_are_misclassified_for_every_attack(model: nn.Module) -> None:
    """NaN off the 8-bit grid: gradient, query and minimum-norm attacks agree; the ledger stays JSON."""

    class Nan(Around):
        def forward(self, x: Tensor) -> Tensor:
            off = ((x * 255).round() / 255 - x).abs().flatten(1).amax(1) > 1e-4
            return torch.where(off[:, None], torch.nan, self.network(x))

    for attack in ("pgd", "square", "noise", "fab-t"):
        found = short(Nan(model), attack=named(attack, Linf(EPSILON), Options(steps=5)), count=10)
        assert found.robust_accuracy == 0, attack
        json.dumps([dict(row) for row in found.rows], allow_nan=False)


# -------------------------------------------------------------------------------------------------------- the ledger


def test_other_code_with_the_same_weights_is_refused(model: nn.Module, tmp_path: Path) -> None:
    short(Around(model, abs), attack=PGD, count=12, out=tmp_path / "e")
    with pytest.raises(HoldfastError, match="its code differs"):
        short(Around(model, torch.neg), attack=PGD, count=12, out=tmp_path / "e")


@pytest.mark.parametrize("key", ["version", "precision", "format", "notes", "classes"])
def test_everything_in_the_protocol_counts(model: nn.Module, tmp_path: Path, key: str) -> None:
    short(model, attack=PGD, count=6, out=tmp_path / "e")
    file = tmp_path / "e" / "protocol.json"
    write_json(file, {**read_json(file), key: "other"})
    with pytest.raises(HoldfastError, match=f"another {key} "):
        short(model, attack=PGD, count=6, out=tmp_path / "e")


def test_examples_asked_for_too_late_are_refused(model: nn.Module, tmp_path: Path) -> None:
    short(model, attack=PGD, count=6, out=tmp_path / "e")
    with pytest.raises(HoldfastError, match="was finished without its examples"):
        short(model, attack=PGD, count=6, out=tmp_path / "e", save_examples=True)


def test_units_without_their_examples_are_done_again(model: nn.Module, tmp_path: Path) -> None:
    """Killed without --save-examples, gone on with it."""
    short(model, attack=PGD, count=20, unit=5, out=tmp_path / "e", save_examples=True)
    (tmp_path / "e" / "units").mkdir()
    lines = (tmp_path / "e" / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "e" / "ledger.jsonl").unlink()
    for number in range(3):
        (tmp_path / "e" / "units" / f"{number:06d}.jsonl").write_text("".join(lines[5 * number : 5 * number + 5]))
    (tmp_path / "e" / "examples" / "000001.safetensors").unlink()
    found = short(model, attack=PGD, count=20, unit=5, out=tmp_path / "e", save_examples=True)
    assert found.examples().shape[0] == 20
    assert without_time(found.rows) == without_time([json.loads(line) for line in lines])


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("ledger.jsonl", "[1]\n", "is damaged"),
        ("ledger.jsonl", "", "has 0 rows for 12 images: restore it from a copy, or delete"),
        ("ledger.jsonl", "{", r"is damaged \(.*\): restore it from a copy, or delete"),
        ("protocol.json", "{", "holds no JSON"),
    ],
)
def test_a_damaged_folder_is_refused(model: nn.Module, tmp_path: Path, file: str, text: str, told: str) -> None:
    short(model, attack=PGD, count=12, out=tmp_path / "e")
    (tmp_path / "e" / file).write_text(text)
    if file == "ledger.jsonl":
        with pytest.raises(HoldfastError, match="was changed or damaged after it was written"):
            short(model, attack=PGD, count=12, out=tmp_path / "e")
        beside(tmp_path / "e" / file).unlink()  # as an older version left it
    with pytest.raises(HoldfastError, match=told):
        short(model, attack=PGD, count=12, out=tmp_path / "e")


def test_damaged_probes_are_measured_again(model: nn.Module, tmp_path: Path) -> None:
    first = short(model, attack=PGD, count=12, out=tmp_path / "e", probe=True)
    (tmp_path / "e" / "probes.json").write_text("{}")
    again = short(model, attack=PGD, count=12, out=tmp_path / "e", probe=True)
    assert [flag.name for flag in again.flags] == [flag.name for flag in first.flags]


# ------------------------------------------------------------------------------------------------------ the recount


@pytest.mark.parametrize("forged", ["broken to wrong", "wrong to broken", "distance", "label", "image"])
def test_a_recount_believes_nothing(model: nn.Module, tmp_path: Path, forged: str) -> None:
    from safetensors.torch import load_file, save_file

    found = short(model, attack=PGD, count=40, out=tmp_path / "e", save_examples=True, unit=40)
    file = tmp_path / "e" / "ledger.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    place = [row["verdict"] for row in found.rows].index("wrong" if forged.startswith("wrong") else "broken")
    if forged == "image":
        saved = tmp_path / "e" / "examples" / "000000.safetensors"
        whole = load_file(saved)
        for name in ("x", "x_adv"):
            whole[name][place] = whole[name][place - 1]
        save_file(whole, saved)
    changes = {"broken to wrong": ("verdict", "wrong"), "distance": ("distance", 0.01), "label": ("label", 11)}
    if forged in changes:
        rows[place][changes[forged][0]] = changes[forged][1]
    elif forged == "wrong to broken":
        rows[place] |= {"verdict": "broken", "attack": "PGD-10", "distance": 0.0}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for digest in (tmp_path / "e").rglob("*.sha256"):
        digest.unlink()  # as someone would who forges on purpose
    if forged in ("label", "image"):
        with pytest.raises(HoldfastError, match="are not those of its ledger"):
            recount(tmp_path / "e", model)
    else:
        assert recount(tmp_path / "e", model)["differing"] == [rows[place]["index"]]


def test_nearest_examples_break_only_what_lies_within_epsilon(model: nn.Module, tmp_path: Path) -> None:
    attack = named("fab-t", Linf(0.05), Options(steps=20), distances=True)
    found = short(model, threat=Linf(0.05), attack=attack, save_examples=True, out=tmp_path / "e")
    within = short(model, threat=Linf(0.05), attack=of_attacks(attack.attacks))
    assert found.robust_accuracy <= within.robust_accuracy + 0.05
    assert found.robust_accuracy > 0.3
    beyond = [row for row in found.rows if row["verdict"] == "robust"]
    assert all(row["distance"] > 0.05 and row["attack"] is None for row in beyond)
    assert not recount(tmp_path / "e", model)["differing"]


# ------------------------------------------------------------------------------------------------------- the choice


def test_n_images_are_drawn_and_keep_their_positions(model: nn.Module) -> None:
    """By a draw that does not depend on the model, not the first n; starts go by the position in the data."""
    inputs = chosen(as_inputs(model, *digits(60)), 20)
    assert inputs.index.tolist() != list(range(20))
    assert torch.equal(inputs.x, digits(60)[0][inputs.index])
    protocol = of_attacks([APGD(steps=3)])
    some = short(model, attack=protocol, count=60, n=20, save_examples=True)
    all_ = short(model, attack=protocol, count=60, save_examples=True)
    assert [row["index"] for row in some.rows] == inputs.index.tolist()
    assert torch.allclose(some.examples(), all_.examples()[inputs.index], atol=1e-6)


def test_probes_look_at_images_of_all_classes() -> None:
    """Test splits may be sorted by class: the probes draw theirs."""
    seen: list[Tensor] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return torch.stack([x.flatten(1).mean(1), 0.5 - x.flatten(1).mean(1)], 1)

    x = torch.linspace(0, 1, 400).view(-1, 1, 1, 1).expand(400, 1, 4, 4).contiguous()
    evaluate(Watched(), x, (x[:, 0, 0, 0] < 0.25).long(), threat=Linf(1e-4), attack=of_attacks([APGD(steps=1)]))
    assert any(len(batch) == PROBED and batch.min() < 0.1 and batch.max() > 0.9 for batch in seen)


def test_named_attacks_have_their_settings() -> None:
    ball = Linf(0.1)
    assert [attack.name for attack in named("quick", ball).attacks] == ["APGD-CE", "APGD-T, 9 targets"]
    assert named("cw", ball).attacks[0].name == "CW-30"
    assert named("apgd-t", ball).attacks[0].targets == named("fab-t", ball).attacks[0].targets == 9
    assert named("pgd", ball).attacks[0] == IterativeGradient(steps=50)
    assert named("multitargeted", ball, Options(steps=7, restarts=2)).attacks[0].passes() == (8, 7)
    assert named("square", ball).attacks[0].queries == 5000


def test_a_setting_goes_to_the_attacks_that_have_it() -> None:
    """And is refused where none has it."""
    ball, source = Linf(0.1), (nn.Linear(1, 1), "other")
    made = named("transfer,noise,pgd", ball, Options(source=source, restarts=3))
    assert [attack.restarts for attack in made.attacks] == [1, 1, 3]
    assert made.attacks[0].source is source[0]
    for words, options in (
        ("noise", Options(source=source)),
        ("quick", Options(steps=5)),
        ("pgd", Options(source=source)),
    ):
        with pytest.raises(HoldfastError, match="leave it out"):
            named(words, ball, options)


def test_near_the_boundary_the_search_goes_on_in_float32(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from holdfast.evaluation import networks

    ran = {True: 0, False: 0}
    run = networks.Searching.run

    def counted(self, x, loss, want, *, fast):
        ran[fast] += len(x)
        return run(self, x, loss, want, fast=fast)

    monkeypatch.setattr(networks.Searching, "run", counted)
    short(model, speed=Speed(precision="bf16"))
    assert ran[True] > ran[False] > 0
    ran.update({True: 0, False: 0})
    protocol = replace(of_attacks([APGD(steps=3, average=2)]), at_end=True)
    short(model, attack=protocol, speed=Speed(precision="bf16"), count=10)
    assert ran[True] == 0


# --------------------------------------------------------------------------------------------------------- refusals


class Fails(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


X, Y = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
FLAT = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("arguments", "settings", "told"),
    [
        ((lambda x: x, X, Y), {}, "give a torch.nn.Module"),
        ((FLAT, X, Y), {"threat": 0.1}, "give Linf"),
        ((FLAT, X, Y), {"attack": ["pgd"]}, "give a name such as autoattack"),
        ((FLAT, X, Y), {"attack": None}, "give a name such as autoattack"),
        ((FLAT, X, Y), {"n": 2.5}, "give a whole number"),
        ((FLAT, X, Y), {"n": True}, "give a whole number"),
        ((FLAT, X, Y), {"n": 0}, "give a whole number"),
        ((FLAT, X, Y), {"seed": "a"}, "seed is 'a'"),
        ((FLAT, X, Y), {"speed": {}}, "give Speed"),
        ((FLAT, X, Y), {"unit": 0}, "give a whole number of images"),
        ((FLAT, [(X, Y)], Y), {}, "which has its own"),
        ((FLAT, [(X, Y), (torch.rand(2, 1, 3, 3), Y[:2])]), {}, "differ in shape"),
        ((FLAT, [("a", "b")]), {}, "no tensors"),
        ((FLAT, X, ["a"] * 4), {}, "labels are no numbers"),
        ((Fails(AssertionError("shape")), X, Y), {}, "cannot run on 4 images"),
        ((Fails(IndexError("deep")), X, Y), {}, "cannot run on 4 images"),
        ((nn.Sequential(nn.Flatten(), nn.Linear(4, 1)), X, Y), {}, "at least two logits"),
        ((nn.Flatten(0), X, Y), {}, "one row of logits an image"),
    ],
)
def test_refused_in_one_line(arguments: tuple, settings: dict, told: str) -> None:
    with pytest.raises(HoldfastError, match=told) as refusal:
        evaluate(*arguments, **{"threat": Linf(0.1), "attack": "pgd", "probe": False, **settings})
    assert "\n" not in str(refusal.value)


def test_labels_and_images_of_any_whole_kind(model: nn.Module) -> None:
    x, y = digits(8)
    expected = [row["verdict"] for row in short(model, attack=PGD, count=8).rows]
    for images, labels in ((x, y.int()), (x, y.tolist()), (x.numpy(), y.numpy()), (x, y.to(torch.uint8))):
        found = holdfast.evaluate(model, images, labels, threat=Linf(EPSILON), attack=PGD, probe=False, unit=16)
        assert [row["verdict"] for row in found.rows] == expected
    listed = holdfast.evaluate(model, x, y, threat=Linf(EPSILON), attack=list(SHORT), probe=False)
    assert listed.summary["attack_label"] == of_attacks(SHORT).label


# ------------------------------------------------------------------------------------------------ the driver's duties


class Outside(IterativeGradient):
    """Says that it stays in the ball, and does not."""

    def advance(self, state, rows, answer, threat, key):
        return {**state, "point": rows.x + 3 * threat.epsilon * torch.randn_like(rows.x).sign()}


def test_no_success_counts_outside_the_ball(model: nn.Module) -> None:
    found = short(model, threat=Linf(0.3), attack=of_attacks([Outside(steps=8, random_start=False)]))
    assert found.robust_accuracy == found.clean_accuracy
    assert sum(row["verified"] for row in found.rows) > 0


def test_every_attack_has_draws_of_its_own(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    start = APGD.start

    def watched(self, rows, threat, key):
        keys.append((self.name, key))
        return start(self, rows, threat, key)

    monkeypatch.setattr(APGD, "start", watched)
    short(model, attack=of_attacks([APGD(steps=2), APGD(steps=2, objective="dlr")]), count=12, threat=Linf(1e-3))
    assert len({name for name, _ in keys}) == len({key for _, key in keys}) == 2


def test_of_several_claims_the_best_is_kept() -> None:
    """The lowest worth of each image; of equal ones the first job."""
    from holdfast.evaluation.pursuit import _first_of_each

    image, worth = torch.tensor([3, 1, 3, 1, 0]), torch.tensor([2.0, 5.0, 1.0, 5.0, 7.0])
    assert sorted(_first_of_each(image, worth, 5).tolist()) == [1, 2, 4]


def test_robust_rows_keep_the_least_margin_inside_the_ball(model: nn.Module) -> None:
    """FAB visits misclassified points outside: they say nothing of the margin within epsilon."""
    found = short(model, threat=Linf(0.02), attack=named("fab-t", Linf(0.02), Options(steps=10)))
    robust = [row for row in found.rows if row["verdict"] == "robust"]
    assert robust
    assert all(0 < row["margin"] <= row["clean_margin"] + 1e-6 for row in robust)


def test_borderline_images_are_listed_as_unstable() -> None:
    """A margin of a ten-thousandth of the logits may turn on another machine; one of a tenth does not."""

    class Close(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.ones(len(x)), 1 - x[:, 0, 0, 0]], 1)

    x = torch.tensor([1e-4, 0.5]).view(2, 1, 1, 1)
    found = evaluate(
        Close(), x, torch.zeros(2).long(), threat=Linf(1e-6), attack=of_attacks([APGD(steps=1)]), probe=False
    )
    assert [row["unstable"] for row in found.rows] == [True, False]
    assert found.summary["unstable"] == [0]


def test_a_recount_tries_every_batch_size_and_the_pixel_bounds(model: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    class Moody(Around):
        moody = False

        def forward(self, x: Tensor) -> Tensor:
            return -self.network(x) if self.moody and len(x) == 2 else self.network(x)

    subject = Moody(model)
    found = short(subject, attack=PGD, count=20, unit=20, out=tmp_path / "e", save_examples=True)
    subject.moody = True
    assert not recount(tmp_path / "e", subject, batch_sizes=(20, 5))["differing"]
    several = recount(tmp_path / "e", subject, batch_sizes=(20, 2))
    assert several["differing"]
    assert several["unstable"]
    file = tmp_path / "e" / "examples" / "000000.safetensors"
    whole = load_file(file)
    place = [row["verdict"] for row in found.rows].index("broken")
    whole["x_adv"][place] -= whole["x_adv"][place].amin() + 0.01  # within epsilon for some pixels, but below 0
    save_file(whole, file)
    beside(file).unlink()
    assert found.rows[place]["index"] in recount(tmp_path / "e", subject, batch_sizes=(20,))["differing"]


def test_a_change_of_the_last_image_is_other_data(model: nn.Module, tmp_path: Path) -> None:
    x, y = digits(12)
    own = {"threat": Linf(EPSILON), "attack": PGD, "probe": False, "out": tmp_path / "e"}
    evaluate(model, x, y, **own)
    changed = x.clone()
    changed[-1, 0, 0, 0] = 0.5
    with pytest.raises(HoldfastError, match="another data"):
        evaluate(model, changed, y, **own)


def test_a_randomised_model_is_evaluated_from_the_same_draws(model: nn.Module) -> None:
    """Whatever was drawn before the call, and in whichever units a killed evaluation goes on."""

    class Draws(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.network(x + 0.05 * torch.randn_like(x))

    one = short(Draws(model), attack=PGD, count=20, unit=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        two = short(Draws(model), attack=PGD, count=20, unit=5)
    assert without_time(one.rows) == without_time(two.rows)
