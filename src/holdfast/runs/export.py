"""The model folder: weights and all that is needed to rebuild and use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from holdfast.errors import Damaged, HoldfastError
from holdfast.models.adapted import initialise, unwrapped
from holdfast.models.extra_state import is_extra, parted
from holdfast.models.factory import build, shapes
from holdfast.models.modes import in_evaluation_mode, in_training_form
from holdfast.models.own_file import OwnCode, names_code
from holdfast.models.trust import trusting
from holdfast.parsing import through_json
from holdfast.regular_files import is_regular
from holdfast.runs.description import check_description
from holdfast.runs.digests import checked_bytes
from holdfast.runs.files import read_json, write_json, write_whole
from holdfast.runs.fitting import load_fitting
from holdfast.runs.own_code import write_code
from holdfast.runs.weights_header import weight_shapes

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"
_ADVICE = (
    "restore it from a copy, or train anew; `holdfast train --resume --out RUN` writes it anew where a checkpoint of"
    " the run still holds it"
)


def model_description(spec: Mapping[str, Any] | None, model: nn.Module) -> dict[str, Any]:
    """What `rebuild` needs: the arguments of `holdfast.models.factory.build`, or a module's own class."""
    if spec is not None:
        return dict(spec)
    kind = type(model)
    return {"name": None, "class": f"{kind.__module__}.{kind.__qualname__}"}


def save_model(
    folder: Path, state: Mapping[str, Any], description: Mapping[str, Any], *, code: OwnCode | None = None
) -> None:
    """Write weights and description. A model from ``file.py:function`` takes its file and the file's neighbours along.

    Args:
        folder: Where to; made if missing.
        state: Parameters and buffers by name, and what modules keep beside them (`holdfast.models.extra_state`).
        description: `model` (see `model_description`), and what a user of the model should know.
        code: The user's own file that makes the model.

    Raises:
        HoldfastError: the disk is full; an earlier model in the folder is untouched.
    """
    weights, beside = parted(state)
    description = dict(through_json({**description, **({"extra_state": beside} if beside else {})}))
    if code is not None:
        write_code(folder, code)
        description["model"]["name"] = code.spec
        description["code"] = {"sha256": code.sha256}
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
    write_whole(folder / WEIGHTS, lambda file: file.write(save(tensors)), hashed=True)
    write_json(folder / DESCRIPTION, description)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, after its SHA-256 has been compared with the one beside it.

    A missing digest is told only where the file lies in a model folder: those of others have none.

    Raises:
        HoldfastError: missing or damaged.
    """
    ours = (file.parent / DESCRIPTION).is_file()
    try:
        weight_shapes(file, advice=_ADVICE)
        return load(checked_bytes(file, advice=_ADVICE, unchecked=None if ours else lambda path: None))
    except FileNotFoundError:
        raise HoldfastError(f"{file} is missing: give a run folder, a model folder or a .safetensors file") from None
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{file} is damaged ({type(error).__name__})", _ADVICE) from error


def load_weights(model: nn.Module, state: Mapping[str, Any], source: Path) -> tuple[str, ...]:
    """Put weights from anywhere into a model, and return what should be told; see `holdfast.runs.fitting`.

    Raises:
        HoldfastError: names or shapes differ; the first few are told.
    """
    return load_fitting(model, state, source)


def _require_same_shapes(own: Mapping[str, Sequence[int] | None], state: Mapping[str, Any], source: Path) -> None:
    """Refuse a state with other names or shapes; None stands for an entry without a shape of its own."""

    def fits(name: str, shape: Sequence[int] | None) -> bool:
        return name in state and (shape is None or tuple(state[name].shape) == tuple(shape))

    wrong = [name for name, shape in own.items() if not fits(name, shape)]
    wrong += [name for name in state if name not in own]
    if wrong:
        raise HoldfastError(
            f"the weights in {source} do not fit the model: {', '.join(wrong[:3])}{' …' if len(wrong) > 3 else ''}"
            " differ; give the same --model and image size as they were trained with"
        )


def model_folder(path: Path, checkpoint: str = "best") -> Path:
    """The model folder that a run folder, or a model folder itself, stands for."""
    if is_regular(path / DESCRIPTION):
        return path
    folder = path / ("model" if checkpoint == "best" else "last")
    if not is_regular(folder / DESCRIPTION):
        raise HoldfastError(
            f"{path} holds no trained model ({folder.name}/{DESCRIPTION} is missing): give a run folder"
        )
    return folder


def read_description(folder: Path) -> dict[str, Any]:
    """What config.json of a model folder says.

    Raises:
        HoldfastError: missing or damaged; without what every model folder says, or with values of other kinds.
    """
    description = read_json(folder / DESCRIPTION, advice=_ADVICE)
    check_description(description, str(folder / DESCRIPTION))
    return description


def load_model(
    path: str | Path,
    *,
    checkpoint: str = "best",
    model: nn.Module | None = None,
    trust_code: bool | str | None = None,
) -> nn.Module:
    """Return a trained model, in evaluation mode: pixels in [0, 1] to logits.

    A model that was made by a user's own file brings that file along. It is executed only where it is trusted
    (`holdfast.models.trust`): after training with it on this machine, or with `trust_code`.

    Args:
        path: A run folder or a model folder.
        checkpoint: ``"best"`` by validation, or ``"last"``.
        model: The architecture, for a model that was given as an `nn.Module` and so cannot be rebuilt by name. The
            weights are loaded into it, and it is returned, without a wrapper such as `nn.DataParallel`.
        trust_code: The SHA-256 of the code that may be executed, or True for whatever code the folder holds.

    Raises:
        HoldfastError: the folder holds no model, it is damaged, it does not fit, or its code is not trusted.
    """
    folder = model_folder(Path(path), checkpoint)
    description = read_description(folder)
    spec = description["model"]
    if model is None and spec.get("name") is None:
        raise HoldfastError(
            f"the model in {folder} is a {spec.get('class')} of your own, given from Python: load it by"
            f" load_model({str(path)!r}, model=THE_MODULE), or name the function that makes it,"
            f" path/to/file.py:function --weights {folder / WEIGHTS}"
        )
    model = None if model is None else unwrapped(model)
    weights: dict[str, Any] = {**read_weights(folder / WEIGHTS), **description.get("extra_state", {})}
    if model is None:
        if not names_code(spec["name"]):  # an absurd size is refused before it is allocated
            _require_same_shapes(shapes(**spec), weights, folder / WEIGHTS)
        with trusting(trust_code):
            model = rebuild(description, folder)
    shape = [description["input"][side] for side in ("channels", "height", "width")]
    initialise(model, torch.zeros(2, *shape), seed=0)
    own = {name: None if is_extra(name) else value.shape for name, value in model.state_dict().items()}
    _require_same_shapes(own, weights, folder / WEIGHTS)
    load_weights(in_training_form(model), weights, folder / WEIGHTS)
    return in_evaluation_mode(model)


def own_code_of(description: Mapping[str, Any], folder: Path) -> OwnCode | None:
    """Return the code of the user's own that makes the model of a folder, or None. It is read, not executed.

    Raises:
        HoldfastError: it is missing, or is not the code that the model was trained with.
    """
    name = str(description["model"].get("name"))
    if not names_code(name):
        return None
    code = OwnCode.in_configuration(name, folder)
    trained_with = (description.get("code") or {}).get("sha256")
    if trained_with not in (None, code.sha256):
        raise Damaged(
            f"{code.path} is not the code that the model was trained with (SHA-256 {code.sha256}, not {trained_with})",
            "restore the file",
        )
    return code


def rebuild(description: Mapping[str, Any], folder: Path) -> nn.Module:
    """Return the architecture of a model folder, with weights drawn from torch's generator.

    Raises:
        HoldfastError: the folder's code is not trusted, or is not the code that the model was trained with.
    """
    options = {key: value for key, value in description["model"].items() if key != "name"}
    name = str(description["model"]["name"])
    code = own_code_of(description, folder)
    with torch.random.fork_rng(devices=[]):
        return build(code or name, **options)
