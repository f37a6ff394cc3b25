"""Building by name and from the user's own file, and every refusal."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import factory
from holdfast.models.factory import build
from holdfast.models.resnet import ResNet18
from holdfast.models.small_cnn import SmallCNN
from holdfast.models.table import MODELS
from holdfast.models.wide_resnet import WideResNet

OWN = """
from torch import nn

def plain(num_classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, num_classes))

def sized(num_classes, image_size, hidden=3, mean=None):
    model = nn.Linear(hidden, num_classes)
    model.told = (image_size, mean)
    return model

def needy(num_classes, mystery):
    return nn.Identity()

def anything(**given):
    model = nn.Identity()
    model.given = given
    return model

def number():
    return 3

class Network(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes

not_callable = 5
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def test_table_and_builders_name_the_same_networks() -> None:
    assert list(MODELS) == list(factory._BUILDERS)
    assert all(line and "\n" not in line for line in MODELS.values())


def test_table_imports_without_torch() -> None:
    check = "import sys, holdfast.models.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("name", MODELS)
def test_every_name_builds_with_its_classes_and_channels(name: str) -> None:
    with torch.device("meta"):
        model = build(name, num_classes=7, channels=1, image_size=(16, 16))
        logits = model.eval()(torch.rand(2, 1, 16, 16))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("name", ["small_cnn", "small-cnn", "Small-CNN", " SMALL_CNN "])
def test_names_in_any_writing(name: str) -> None:
    assert isinstance(build(name, num_classes=10), SmallCNN)


def test_wide_names_give_their_depth() -> None:
    with torch.device("meta"):
        model = build("WRN-28-10", num_classes=10)
    assert isinstance(model, WideResNet)
    assert len(model.block1.layer) == 4
    assert model.block1.layer[0].conv1.out_channels == 160


def test_options_reach_the_network() -> None:
    model = build("resnet18", num_classes=10, width=8)
    assert isinstance(model, ResNet18)
    assert model.fc.in_features == 64
    with torch.device("meta"):
        wide = build("wrn_34_10", num_classes=10, dropout=0.3)
    assert any(isinstance(module, nn.Dropout) and module.p == 0.3 for module in wide.modules())


def test_image_size_reaches_the_network() -> None:
    small = build("small_cnn", num_classes=10, image_size=(8, 8))
    assert isinstance(small, SmallCNN)
    assert small.layer2.conv.stride == (1, 1)


def test_statistics_reach_the_network_and_default_to_none() -> None:
    model = build("small_cnn", num_classes=10, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    assert isinstance(model, SmallCNN)
    assert torch.equal(model.normalize.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(model.normalize.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))
    default = build("small_cnn", num_classes=10)
    assert isinstance(default, SmallCNN)
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(default.normalize(x), x)


@pytest.mark.parametrize("name", ["small_cnn", "small_vit"])
def test_weights_depend_on_the_global_seed_alone(name: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build(name, num_classes=10, image_size=(8, 8)).parameters())

    first = weights(0)
    torch.rand(5)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "no network is named 'resnet81': use .*resnet18"),
        ("wrn_34_20", "use .*wrn_34_10"),
        ("zzz", "use small_cnn or resnet18"),
        ("", "use small_cnn or resnet18"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, message: str) -> None:
    with pytest.raises(HoldfastError, match=message):
        build(name, num_classes=10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("small_cnn", {"widht": 3}, "small_cnn does not take 'widht': its options are width$"),
        ("wrn_28_10", {"depth": 40}, "wrn_28_10 does not take 'depth': its options are dropout$"),
        ("wrn_28_10", {"widen": 2}, "does not take 'widen'"),
        ("resnet18", {"dropout": 0.1}, "resnet18 does not take 'dropout': its options are width$"),
        ("small_vit", {"width": 2}, "its options are depth, dim, heads, mlp_ratio, patch$"),
    ],
)
def test_unknown_options_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(HoldfastError, match=message):
        build(name, num_classes=10, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be"),
        ({"num_classes": 10, "channels": 0}, "channels must be"),
        ({"num_classes": 10, "image_size": (0, 8)}, "height must be"),
        ({"num_classes": 10, "image_size": (8, 0)}, "width must be"),
        ({"num_classes": 10, "image_size": (8,)}, r"image_size must be \(height, width\)"),
        ({"num_classes": 10, "width": 0}, "width must be"),
    ],
)
def test_sizes_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(HoldfastError, match=message):
        build("resnet18", **arguments)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "small_cnn"])
def test_zero_width_is_refused(name: str) -> None:
    with pytest.raises(HoldfastError, match="width must be"):
        build(name, num_classes=10, width=0)


def test_own_function_gets_what_its_signature_has(own: Path) -> None:
    model = build(f"{own}:plain", num_classes=4, channels=2, image_size=(8, 8))
    assert model(torch.rand(3, 2, 8, 8)).shape == (3, 4)
    sized = build(f"{own}:sized", num_classes=4, image_size=(5, 6), hidden=9, mean=(0.5,))
    assert isinstance(sized, nn.Linear)
    assert sized.in_features == 9
    assert sized.told == ((5, 6), (0.5,))
    everything = build(f"{own}:anything", num_classes=4, extra=1)
    assert everything.given == {"num_classes": 4, "channels": 3, "image_size": (32, 32), "extra": 1}


def test_own_class_is_a_callable_too_and_can_be_pickled(own: Path) -> None:
    model = build(f"{own}:Network", num_classes=4)
    assert model.num_classes == 4
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


def test_own_file_may_import_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_own.py").write_text("from torch import nn\nmake = nn.Identity\n")
    (tmp_path / "main.py").write_text("from neighbour_of_own import make\ndef network(): return make()\n")
    before = list(sys.path)
    assert isinstance(build(f"{tmp_path / 'main.py'}:network", num_classes=4), nn.Identity)
    assert sys.path == before
    assert "neighbour_of_own" not in sys.modules


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("plian", {}, "has no function 'plian': did you mean plain"),
        ("qqqq", {}, "has no function 'qqqq': define it at the top level"),
        ("not_callable", {}, "has no function 'not_callable'"),
        ("number", {}, "returned int: it must return a torch.nn.Module"),
        ("needy", {}, "needs mystery: pass them as options"),
        ("plain", {"depth": 3}, "does not take 'depth': it has no options"),
        ("sized", {"depth": 3}, "does not take 'depth': its options are hidden"),
        ("plain", {"mean": (0.5,)}, "does not take 'mean'"),
    ],
)
def test_own_file_refusals(own: Path, function: str, options: dict, message: str) -> None:
    before = list(sys.path)
    with pytest.raises(HoldfastError, match=message):
        build(f"{own}:{function}", num_classes=4, **options)
    assert sys.path == before


@pytest.mark.parametrize("spec", ["own.py", "own.py:", "own.txt:plain", ":plain", "folder:plain"])
def test_own_file_forms_that_are_refused(spec: str) -> None:
    with pytest.raises(HoldfastError, match=r"write it as path/to/file\.py:function"):
        build(spec, num_classes=4)


def test_missing_own_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HoldfastError, match=r"there is no file .*absent\.py"):
        build(f"{tmp_path / 'absent.py'}:plain", num_classes=4)


def test_error_of_own_code_comes_through_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise ZeroDivisionError('mine')\ndef plain(): pass\n")
    before, modules = list(sys.path), set(sys.modules)
    with pytest.raises(ZeroDivisionError, match="mine"):
        build(f"{tmp_path / 'broken.py'}:plain", num_classes=4)
    assert sys.path == before
    assert set(sys.modules) == modules
