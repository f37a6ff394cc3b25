"""The model folder: weights and all that is needed to rebuild and use them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.models.factory import build
from holdfast.runs.files import full_disk_told, read_json, write_json, write_whole

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"


def model_description(spec: Mapping[str, Any] | None, model: nn.Module) -> dict[str, Any]:
    """What `rebuild` needs: the arguments of `holdfast.models.factory.build`, or a module's own class."""
    if spec is not None:
        return dict(spec)
    kind = type(model)
    return {"name": None, "class": f"{kind.__module__}.{kind.__qualname__}"}


def save_model(folder: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write weights and description. A model from ``file.py:function`` takes its file along.

    Args:
        folder: Where to; made if missing.
        state: Parameters and buffers by name.
        description: `model` (see `model_description`), and what a user of the model should know.

    Raises:
        HoldfastError: the disk is full; an earlier model in the folder is untouched.
    """
    description = json.loads(json.dumps(description))
    name = description["model"].get("name")
    if name and ":" in name:
        source = Path(name.rpartition(":")[0]).expanduser()
        with full_disk_told(folder / source.name):
            folder.mkdir(parents=True, exist_ok=True)
            if source.is_file() and source.resolve() != (folder / source.name).resolve():
                shutil.copyfile(source, folder / source.name)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    write_whole(folder / WEIGHTS, lambda file: file.write(save(tensors)))
    write_json(folder / DESCRIPTION, description)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        HoldfastError: missing or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        raise HoldfastError(f"{file} is missing: give a run folder, a model folder or a .safetensors file") from None
    except (SafetensorError, OSError) as error:
        raise HoldfastError(f"{file} is damaged ({type(error).__name__}): restore it or train anew") from error


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Put weights into a model.

    Raises:
        HoldfastError: names or shapes differ; the first few are told.
    """
    own = model.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    wrong += [name for name in state if name not in own]
    if wrong:
        raise HoldfastError(
            f"the weights in {source} do not fit the model: {', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}"
            " differ; give the same --model and image size as they were trained with"
        )
    model.load_state_dict(dict(state))


def model_folder(path: Path, checkpoint: str = "best") -> Path:
    """The model folder that a run folder, or a model folder itself, stands for."""
    if (path / DESCRIPTION).is_file():
        return path
    folder = path / ("model" if checkpoint == "best" else "last")
    if not (folder / DESCRIPTION).is_file():
        raise HoldfastError(
            f"{path} holds no trained model ({folder.name}/{DESCRIPTION} is missing): give a run folder"
        )
    return folder


def read_description(folder: Path) -> dict[str, Any]:
    """What config.json of a model folder says.

    Raises:
        HoldfastError: missing, damaged, or without what every model folder says.
    """
    description = read_json(folder / DESCRIPTION)
    for key in ("model", "input", "threat"):
        if not isinstance(description.get(key), dict):
            raise HoldfastError(f"{folder / DESCRIPTION} is damaged: it lacks {key!r}; restore it or train anew")
    return description


def load_model(path: str | Path, *, checkpoint: str = "best", model: nn.Module | None = None) -> nn.Module:
    """A trained model, in evaluation mode: pixels in [0, 1] to logits.

    Args:
        path: A run folder or a model folder.
        checkpoint: ``"best"`` by validation, or ``"last"``.
        model: The architecture, for a model that was given as an `nn.Module` and so cannot be rebuilt by name.

    Raises:
        HoldfastError: the folder holds no model, it is damaged, or it does not fit.
    """
    folder = model_folder(Path(path), checkpoint)
    spec = dict(read_description(folder)["model"])
    if model is None:
        if spec.get("name") is None:
            raise HoldfastError(
                f"the model in {folder} is a {spec.get('class')} of your own: pass it as load_model(path, model=…)"
            )
        model = rebuild(spec, folder)
    load_weights(model, read_weights(folder / WEIGHTS), folder / WEIGHTS)
    return model.eval()


def rebuild(spec: Mapping[str, Any], folder: Path | None = None) -> nn.Module:
    """The architecture of a description, with weights drawn from torch's generator."""
    options = {key: value for key, value in spec.items() if key != "name"}
    name = str(spec["name"])
    if ":" in name and folder is not None:
        file, _, function = name.rpartition(":")
        if (folder / Path(file).name).is_file():
            name = f"{folder / Path(file).name}:{function}"
    with torch.random.fork_rng(devices=[]):
        return build(name, **options)
