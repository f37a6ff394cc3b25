"""A run folder that somebody sent: none of the ways into it executes its code without trust, and each works with it.

Another machine is played by an empty trust store and a process in which nobody has named anything.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import holdfast
from holdfast import fit
from holdfast.configuration import build_recipe
from holdfast.data.extra import pseudo_labels
from holdfast.errors import HoldfastError
from holdfast.models import trust
from holdfast.models.own_file import OwnCode
from holdfast.runs.folder import read_config
from holdfast.runs.own_code import configured_code
from holdfast.train import FinishedRun
from tiny_runs import FP32, NET, command, quadrants, refused, toy, train, write_toy

BLOCKS = """import os
from pathlib import Path
if os.environ.get("HOLDFAST_TEST_MARK"):
    Path(os.environ["HOLDFAST_TEST_MARK"]).write_text("ran")
"""


@dataclass(frozen=True)
class Sent:
    """What an author made and sent.

    Attributes:
        run: A run whose network comes from net.py and its neighbour blocks.py.
        plain: The recipient's own run, of a network by name.
        data: What both were trained on.
        unlabelled: Images without labels.
        sha256: Of the code.
    """

    run: Path
    plain: Path
    data: Path
    unlabelled: Path
    sha256: str

    @property
    def evaluation(self) -> Path:
        """An evaluation of the run, with examples."""
        return self.run / "evaluations" / "one"


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Sent:
    """Made on the author's machine; the author's own files are gone."""
    place = tmp_path_factory.mktemp("sent")
    author = place / "author"
    author.mkdir()
    (author / "net.py").write_text("import blocks\n" + NET)
    (author / "blocks.py").write_text(BLOCKS)
    data = write_toy(place / "toy.npz", count=48, test=8)
    code = OwnCode.named(f"{author}/net.py:make")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv(trust.STATE_VARIABLE, str(place / "authors-state"))
        assert train(data, place / "run", "--model", f"{author}/net.py:make", epochs=1) == 0
        assert train(data, place / "plain", epochs=1) == 0
        words = ["evaluate", place / "run", "--attack", "fgsm", "--save-examples"]
        assert command(*words, "--out", place / "run" / "evaluations" / "one") == 0
    shutil.rmtree(author)
    np.savez(place / "unlabelled.npz", x=quadrants(24, 5)[0])
    return Sent(place / "run", place / "plain", data, place / "unlabelled.npz", code.sha256)


@pytest.fixture
def elsewhere(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another machine. Returns the file that the sent code writes when it is executed."""
    monkeypatch.setenv("HOLDFAST_TEST_MARK", str(tmp_path / "mark"))
    return tmp_path / "mark"


def config_of(sent: Sent, folder: Path, **changes: object) -> Path:
    """The sent run's configuration in a folder of its own, with its code and with other values."""
    shutil.copytree(sent.run / "code", folder / "code")
    config = {**read_config(sent.run / "config.yaml"), **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


Try = Callable[[Sent, Path, "str | None"], None]


def verb(*words: str) -> Try:
    """A command line; {run} and so on are filled in, and --trust-code is added where the code is to be trusted."""

    def run(sent: Sent, folder: Path, sha256: str | None) -> None:
        places = {"run": sent.run, "plain": sent.plain, "data": sent.data, "unlabelled": sent.unlabelled}
        filled = [word.format(out=folder / "out", evaluation=sent.evaluation, **places) for word in words]
        with_trust = [f"--trust-code={sha256}"] if sha256 else []
        outcome = command(*filled, *with_trust)
        if outcome == 2:
            raise HoldfastError("refused")
        assert outcome == 0

    return run


def resume(sent: Sent, folder: Path, sha256: str | None) -> None:
    """The last checkpoint is there, the summary is not: the network is needed."""
    shutil.copytree(sent.run, folder / "copy")
    (folder / "copy" / "summary.json").unlink()
    verb("train", "--resume", "--out", str(folder / "copy"))(sent, folder, sha256)


def configured_network(sent: Sent, folder: Path, sha256: str | None) -> None:
    """A configuration whose further network is code."""
    guided = folder / "guided"
    verb("train", "lbgat", "--data", "{data}", "--threat.epsilon", "0.1", "--model.width", "4", "--epochs", "1",
         "--batch-size", "16", "--attack.steps", "1", "--training.validation_steps", "1", "--training.test_steps", "1",
         "--out", str(guided))(sent, folder, None)  # fmt: skip
    config = read_config(guided / "config.yaml")
    config["networks"]["guide"]["model"] = "code/model/net.py:make"
    file = config_of(sent, folder / "made", **{key: config[key] for key in config if key != "resolved"})
    verb("train", "--config", str(file), "--out", "{out}")(sent, folder, sha256)


def configured_init(sent: Sent, folder: Path, sha256: str | None) -> None:
    """A configuration whose further network lies in the sent run."""
    networks = {"guide": {"model": "", "init": str(sent.run), "trained": True}}
    plain = read_config(sent.plain / "config.yaml")
    lbgat = {"objective": {"name": "boundary_guided"}, "networks": networks}
    file = config_of(sent, folder / "made", **{**plain, **lbgat})
    verb("train", "--config", str(file), "--out", "{out}")(sent, folder, sha256)


def configured_labels(sent: Sent, folder: Path, sha256: str | None) -> None:
    """A configuration whose extra images are labelled by the sent run."""
    plain = read_config(sent.plain / "config.yaml")
    extra = {"extra_data": str(sent.unlabelled), "extra_labels": str(sent.run)}
    changed = {**plain, "extra_share": 0.5, "training": {**plain["training"], **extra}}
    verb("train", "--config", str(config_of(sent, folder / "made", **changed)), "--out", "{out}")(sent, folder, sha256)


def python_fit(sent: Sent, folder: Path, sha256: str | None) -> None:
    """From Python, by a configuration that was read."""
    config = read_config(sent.run / "config.yaml")
    code = configured_code(config, sent.run)
    options = {key: value for key, value in config["model"].items() if key != "name"}
    recipe, settings = build_recipe(config), FP32
    fit(recipe, str(sent.data), config["model"]["name"], out=folder / "out", settings=settings, code=code,
        model_options=options, trust_code=sha256)  # fmt: skip


def python_labels(sent: Sent, folder: Path, sha256: str | None) -> None:
    """Labels from a sent model."""
    with trust.trusting(sha256):
        pseudo_labels(toy().train.pixels, str(sent.run), replace(toy(), classes=tuple("0123")))


def python_model(sent: Sent, folder: Path, sha256: str | None) -> None:
    """The network of a finished run."""
    with trust.trusting(sha256):
        FinishedRun(sent.run, {}).model("last")


TEACH = ("train", "lbgat", "--data", "{data}", "--threat.epsilon", "0.1", "--model.width", "4", "--epochs", "1",
         "--batch-size", "16", "--attack.steps", "1", "--training.validation_steps", "1", "--training.test_steps", "1",
         "--out", "{out}")  # fmt: skip
LABEL = ("train", "pgd_at", "--data", "{data}", "--threat.epsilon", "0.1", "--model.width", "4", "--epochs", "1",
         "--batch-size", "16", "--attack.steps", "1", "--training.validation_steps", "1", "--training.test_steps", "1",
         "--out", "{out}", "--extra-share", "0.5", "--training.extra_data", "{unlabelled}")  # fmt: skip
FGSM = ("--attack", "fgsm", "--out", "{out}")

ENTRIES: dict[str, Try] = {
    "evaluate RUN": verb("evaluate", "{run}", *FGSM),
    "evaluate RUN --checkpoint last": verb("evaluate", "{run}", "--checkpoint", "last", *FGSM),
    "evaluate MODEL": verb("evaluate", "{run}/model", "--data", "{data}", *FGSM),
    "evaluate --source RUN": verb("evaluate", "{plain}", "--attack", "transfer", "--source", "{run}", "--out", "{out}"),
    "verify EVALUATION": verb("verify", "{evaluation}"),
    "verify --model RUN": verb("verify", "{evaluation}", "--model", "{run}"),
    "train --resume": resume,
    "train --config": verb("train", "--config", "{run}/config.yaml", "--out", "{out}"),
    "train --networks.X.init RUN": verb(*TEACH, "--networks.guide.init", "{run}"),
    "train --training.extra_labels RUN": verb(*LABEL, "--training.extra_labels", "{run}"),
    "train --config, networks.X.model": configured_network,
    "train --config, networks.X.init": configured_init,
    "train --config, training.extra_labels": configured_labels,
    "load_model(RUN)": lambda sent, _, sha256: holdfast.load_model(sent.run, trust_code=sha256) and None,
    "load_model(MODEL)": lambda sent, _, sha256: holdfast.load_model(sent.run / "last", trust_code=sha256) and None,
    "FinishedRun.model()": python_model,
    "fit(code=…)": python_fit,
    "pseudo_labels(RUN)": python_labels,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_way_into_a_sent_folder(entry: str, sent: Sent, elsewhere: Path, tmp_path: Path) -> None:
    for name in ("refused", "trusted"):
        (tmp_path / name).mkdir()
    with pytest.raises(HoldfastError):
        ENTRIES[entry](sent, tmp_path / "refused", None)
    assert not elsewhere.exists(), "the code was executed"
    assert not (tmp_path / "refused" / "out").exists()
    ENTRIES[entry](sent, tmp_path / "trusted", sent.sha256)
    assert elsewhere.read_text() == "ran"


def test_a_folder_that_is_called_like_code_is_only_a_folder(
    sent: Sent, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies above an evaluation was not named by the person who verifies it."""
    shutil.copytree(sent.run / "model", tmp_path / "sent")
    shutil.copytree(sent.evaluation, tmp_path / "sent" / "net.py:make" / "evaluations" / "one")
    (tmp_path / "evaluation").symlink_to(tmp_path / "sent" / "net.py:make" / "evaluations" / "one")
    for more in ([], ["--data", sent.data]):
        assert "does not lie in a run" in refused(capsys, "verify", tmp_path / "evaluation", *more)
    assert not elsewhere.exists()


def test_a_configuration_that_was_read_in_python_names_no_code_by_itself(sent: Sent, elsewhere: Path) -> None:
    """A recipe that is built of it must be given the code that it names."""
    config = {**read_config(sent.plain / "config.yaml"), "objective": {"name": "boundary_guided"}}
    config["networks"] = {"guide": {"model": f"{sent.run / 'model'}/net.py:make", "init": None, "trained": True}}
    with pytest.raises(HoldfastError, match="configuration names the code"):
        build_recipe(config)
    assert not elsewhere.exists()


def test_the_refusal_says_file_hash_and_what_to_do(
    sent: Sent, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, "evaluate", sent.run, "--attack", "fgsm")
    assert str(sent.run / "model" / "net.py") in told
    assert f"--trust-code={sent.sha256}" in told
    assert command("evaluate", sent.run, "--attack", "fgsm", "--out", elsewhere.parent / "a", "--trust-code") == 0
    assert f"running {sent.run / 'model' / 'net.py'}:make, SHA-256 {sent.sha256}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["compare", "{evaluation}", "{evaluation2}"], ["train", "--init"], ["list", "data"]])
def test_ways_that_need_no_code_need_no_trust(words: list[str], sent: Sent, elsewhere: Path, tmp_path: Path) -> None:
    """Comparing evaluations, and beginning from the weights of a sent run."""
    if words[0] == "compare":
        shutil.copytree(sent.evaluation, tmp_path / "two")
        assert command("compare", sent.evaluation, tmp_path / "two") == 0
    elif words[0] == "train":
        (tmp_path / "mine.py").write_text(NET)
        code = train(sent.data, tmp_path / "out", "--init", sent.run, "--model", f"{tmp_path}/mine.py:make", epochs=1)
        assert code == 0
    else:
        assert command(*words) == 0
    assert not elsewhere.exists()


@pytest.mark.parametrize("file", ["net.py", "blocks.py"])
def test_code_that_was_changed_is_not_that_of_the_model(
    file: str, sent: Sent, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even where any code is trusted."""
    shutil.copytree(sent.run, tmp_path / "run")
    for place in ("model", "code/model"):
        changed = tmp_path / "run" / place / file
        changed.write_text(changed.read_text() + "# changed\n")
    words = ["--attack", "fgsm", "--trust-code"]
    assert "is not the code that the model was trained with" in refused(capsys, "evaluate", tmp_path / "run", *words)
    assert not elsewhere.exists()


# ---------------------------------------------------------------------------------------- at home, and resumed


def test_training_fills_the_store_and_later_commands_just_work(
    sent: Sent, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sent.run / "code" / "model", tmp_path / "mine")
    assert train(sent.data, tmp_path / "run", "--model", f"{tmp_path}/mine/net.py:make", epochs=1) == 0
    told = capsys.readouterr().err
    assert f"model is made by {tmp_path}/mine/net.py, named by you (SHA-256 {sent.sha256})" in told
    assert (tmp_path / "state" / "trusted-code" / f"{sent.sha256}-net-make").is_file()
    shutil.rmtree(tmp_path / "mine")
    monkeypatch.setattr(trust, "_named", set())  # another process
    config = read_config(tmp_path / "run" / "config.yaml")
    assert config["model"]["name"] == "code/model/net.py:make"
    assert {file.name for file in (tmp_path / "run" / "code" / "model").iterdir()} == {"net.py", "blocks.py"}
    assert {"net.py", "blocks.py"} < {file.name for file in (tmp_path / "run" / "model").iterdir()}
    holdfast.load_model(tmp_path / "run")
    for words in (["evaluate", tmp_path / "run", "--attack", "fgsm"], ["train", "--resume", "--out", tmp_path / "run"]):
        assert command(*words) == 0
    again = ["train", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again"]
    assert command(*again) == 0
    assert "trusted since it was trained with here" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["named", "option", "environment"])
def test_a_resume_in_a_fresh_home(
    how: str,
    sent: Sent,
    elsewhere: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By naming one's own copy of the file, or by its hash; the run says by which."""
    shutil.copytree(sent.run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.copytree(sent.run / "code" / "model", tmp_path / "mine")
    words = {"named": ["--model", f"{tmp_path}/mine/net.py:make"], "option": [f"--trust-code={sent.sha256}"]}
    if how == "environment":
        monkeypatch.setenv(trust.HASH_VARIABLE, sent.sha256)
    assert command("train", "--resume", "--out", tmp_path / "run", *words.get(how, [])) == 0
    told = capsys.readouterr().err
    says = {"named": "named by you", "option": "trusted by --trust-code", "environment": "HOLDFAST_TRUST_CODE"}
    assert says[how] in told
    before, after = (json.loads((run / "summary.json").read_text()) for run in (sent.run, tmp_path / "run"))
    assert before["best"] == after["best"]


def test_a_resume_with_other_code_is_refused(
    sent: Sent, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sent.run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.copytree(sent.run / "code" / "model", tmp_path / "mine")
    (tmp_path / "mine" / "blocks.py").write_text("# another one\n")
    words = ["train", "--resume", "--out", tmp_path / "run", "--model", f"{tmp_path}/mine/net.py:make"]
    assert "is not the code that this run was begun with" in refused(capsys, *words)


def test_a_run_of_an_earlier_version_goes_on(
    sent: Sent, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the author's path, and has copies in its model folders only."""
    shutil.copytree(sent.run, tmp_path / "run")
    for gone in ("summary.json",):
        (tmp_path / "run" / gone).unlink()
    shutil.rmtree(tmp_path / "run" / "code")
    config = read_config(tmp_path / "run" / "config.yaml")
    config["model"]["name"] = "/home/author/net.py:make"
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert command("train", "--resume", "--out", tmp_path / "run", "--trust-code") == 0
    assert (tmp_path / "run" / "code" / "model" / "blocks.py").is_file()


def test_an_unwritable_store_is_told_at_the_start_of_training(
    sent: Sent, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").write_text("a file is in the way")
    shutil.copytree(sent.run / "code" / "model", tmp_path / "mine")
    assert train(sent.data, tmp_path / "run", "--model", f"{tmp_path}/mine/net.py:make", epochs=1) == 0
    told = capsys.readouterr().err
    assert "the trust store cannot be written" in told
    assert told.index("trust store") < told.index("epoch ")
    holdfast.load_model(tmp_path / "run")  # in the same process it is known who named it


def test_the_run_folder_is_portable_between_processes(sent: Sent, elsewhere: Path) -> None:
    """The network is the one that was trained."""
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    one = holdfast.load_model(sent.run, trust_code=True)
    other = holdfast.load_model(sent.run / "model", trust_code=sent.sha256)
    assert torch.equal(one(x), other(x))
