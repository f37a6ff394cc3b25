"""A zoo of defences that only look robust, each with the flag that tells it, and the honest networks that they wrap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import Batch, Linf, View, load_data
from holdfast.attacks.pgd import PGD
from holdfast.data.loader import to_pixels
from holdfast.evaluation.flags import Flag
from holdfast.evaluation.probes import probe
from holdfast.functional import cross_entropy
from holdfast.keyed_random import Key
from holdfast.threat import ThreatModel

BALL = Linf(0.2)


@cache
def digits() -> Batch:
    """Sixty-four test digits."""
    test = load_data("digits").test
    return Batch(to_pixels(test.pixels[:64], torch.float32), test.labels[:64], None, torch.arange(64))


@cache
def honest_network(within: float) -> nn.Module:
    """A small network, trained on images (0) or on their PGD-2 images. Copy it before changing it."""
    train = load_data("digits").train
    x, y = to_pixels(train.pixels, torch.float32), train.labels
    attack = PGD(steps=2, step_size=within)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
        )
        optimizer = torch.optim.Adam(network.parameters(), 5e-3)
        for _ in range(6 if within else 3):
            for rows in torch.randperm(len(x)).split(128):
                batch = Batch(x[rows], y[rows], None, rows)
                seen = batch.x
                if within:
                    seen = attack(View(network), batch, _entropy(batch.y), threat=Linf(within)).x_adv
                optimizer.zero_grad()
                cross_entropy(network(seen), batch.y).mean().backward()
                optimizer.step()
    optimizer.zero_grad()
    return network.eval()


def _entropy(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: cross_entropy(logits, y)


class Around(nn.Module):
    """A function before the network and one after it."""

    def __init__(
        self,
        network: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__()
        self.network = network
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(self.before(x)))


class GradientCut(nn.Module):
    """The forward runs without a graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class BatchStatistics(nn.Module):
    """Normalises by the batch in evaluation mode too, and moves running statistics while it does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.zeros(10))
        self.register_buffer("var", torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.network(x), self.mean, self.var, training=True)


class WaveringInput(nn.Module):
    """A ripple far finer than epsilon and far steeper than the network: gradients point anywhere."""

    def __init__(self, network: nn.Module, *, height: float = 0.01, frequency: float = 3e4) -> None:
        super().__init__()
        self.network = network
        self.height, self.frequency = height, frequency

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + self.height * torch.sin(self.frequency * x))


class SteepSigmoid(nn.Module):
    """A smooth step in place of every pixel: nearly flat but at the threshold."""

    def __init__(self, network: nn.Module, *, steepness: float = 100.0) -> None:
        super().__init__()
        self.network = network
        self.steepness = steepness

    def forward(self, x: Tensor) -> Tensor:
        return self.network(torch.sigmoid(self.steepness * (x - 0.5)))


class SmallStepsHide(nn.Module):
    """Grows surer with the distance from its own reference images, where that is of middle length.

    Small steps are led back to the image, one of full length jumps over: what training against one step can make.
    """

    def __init__(self, network: nn.Module, x: Tensor, *, hidden: tuple[float, float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("x", x)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        near = self.x[torch.cdist(x.flatten(1), self.x.flatten(1)).argmin(1)]
        delta = (x - near).flatten(1).abs()
        hidden = (delta.amax(1) > self.hidden[0]) & (delta.amax(1) < self.hidden[1])
        surer = self.network(near) * (1 + 20 * delta.mean(1, keepdim=True))
        return torch.where(hidden[:, None], surer, self.network(x))


class WrongBackward(nn.Module):
    """The gradient's sign is turned on its way back."""

    class Turn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *gradient: Tensor) -> Tensor:
            return -gradient[0]

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.Turn.apply(x))


class Purifier(nn.Module):
    """Takes a step towards its own prediction before it classifies."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = x.detach().requires_grad_(True)
            logits = self.network(moved)
            F.cross_entropy(logits, logits.argmax(1)).backward()
            assert moved.grad is not None
        return self.network((x - 0.05 * moved.grad.sign()).clamp(0, 1))


class Constant(nn.Module):
    """One class for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.arange(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias + 0 * x.flatten(1).sum(1, keepdim=True)


class StaysInTraining(nn.Module):
    """Puts its own dropout back into training mode at every forward."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        self.dropout.train()
        return self.network(self.dropout(x))


def thermometer(x: Tensor) -> Tensor:
    """One hot step for every level that is passed, added up again: sixteen levels with hard thresholds."""
    levels = torch.arange(1, 17, device=x.device) / 17
    return (x.unsqueeze(-1) > levels).float().mean(-1)


def straight_noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def random_shift(x: Tensor) -> Tensor:
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return x.roll((down, right), (2, 3))


def tampered(x: Tensor) -> Tensor:
    """Images with a pixel that is no multiple of 1/255, (B, 1, 1, 1) bool."""
    return ((x * 255 - (x * 255).round()).abs() > 1e-3).flatten(1).any(1).view(-1, 1, 1, 1)


def refuse_odd_pixels(x: Tensor) -> Tensor:
    """NaN where a pixel is no multiple of 1/255: "this image was tampered with"."""
    return torch.where(tampered(x), torch.nan, x)


def noise_where_tampered(x: Tensor) -> Tensor:
    """Nothing is drawn for images that come from a file."""
    return torch.where(tampered(x), x + 0.3 * torch.randn_like(x), x)


def noise_where_unsure(logits: Tensor) -> Tensor:
    """Nothing is drawn for images that the network is sure of."""
    first, second = logits.topk(2, dim=1).values.T
    return torch.where((first - second < 1.5)[:, None], logits + 5 * torch.randn_like(logits), logits)


def noise_now_and_then(x: Tensor) -> Tensor:
    """One call in three draws."""
    return x + 0.3 * torch.randn_like(x) if float(torch.rand(())) < 1 / 3 else x


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy().copy())


def in_place(x: Tensor) -> Tensor:
    return x.mul_(0.9)


@dataclass(frozen=True)
class Defence:
    """One of the zoo.

    Attributes:
        flag: What must be said of it; several names with blanks between them.
        make: From an honest network and the images.
        x: What to do to the images first.
        severity: Of the flag.
    """

    flag: str
    make: Callable[[nn.Module, Tensor], nn.Module]
    x: Callable[[Tensor], Tensor] = field(default=lambda x: x)
    severity: str = "serious"


def probed(model: nn.Module, batch: Batch, threat: ThreatModel = BALL, *, seed: int = 0) -> dict[str, Flag]:
    """Flags by name."""
    flags = probe(model, batch.x, batch.y, threat, key=Key(seed), index=batch.index)
    assert len({flag.name for flag in flags}) == len(flags)
    return {flag.name: flag for flag in flags}


def in_train_mode(network: nn.Module, x: Tensor) -> nn.Module:
    return Around(network).train()


def partly_in_train_mode(network: nn.Module, x: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Dropout(0.0), network).eval()
    model[0].train()
    return model


ZOO: dict[str, Defence] = {
    "softmax at the end": Defence("probabilities", lambda f, x: nn.Sequential(f, nn.Softmax(1))),
    "softmax in percent": Defence("probabilities", lambda f, x: Around(f, after=lambda z: 100 * z.softmax(1))),
    "sigmoid at the end": Defence("probabilities", lambda f, x: nn.Sequential(f, nn.Sigmoid()), severity="warning"),
    "logits times a million": Defence("saturated-cross-entropy", lambda f, x: Around(f, after=lambda z: 1e6 * z)),
    "rounded input": Defence(
        "zero-gradients accurate-at-huge-epsilon loss-not-monotone",
        lambda f, x: Around(f, lambda x: (x * 8).round() / 8),
    ),
    "thermometer": Defence("no-gradients", lambda f, x: Around(f, thermometer)),
    "sign of the logits": Defence("zero-gradients", lambda f, x: Around(f, after=lambda z: z.sign() + z.round())),
    "clipped logits": Defence("zero-gradients", lambda f, x: Around(f, after=lambda z: z.clamp(-0.5, 0.5))),
    "detached": Defence("no-gradients", lambda f, x: Around(f, lambda x: x.detach())),
    "no grad": Defence("no-gradients", lambda f, x: GradientCut(f)),
    "one hot of the prediction": Defence(
        "no-gradients", lambda f, x: Around(f, after=lambda z: 5 * F.one_hot(z.argmax(1), z.shape[1]).float())
    ),
    "through numpy": Defence("no-gradients", lambda f, x: Around(f, through_numpy)),
    "noise": Defence("randomised", lambda f, x: Around(f, straight_noise)),
    "dropout left on": Defence("randomised", lambda f, x: Around(f, lambda x: F.dropout(x, 0.3, training=True))),
    "dropout put back on": Defence("randomised", lambda f, x: StaysInTraining(f)),
    "noise where tampered": Defence("randomised", lambda f, x: Around(f, noise_where_tampered)),
    "noise where unsure": Defence("randomised", lambda f, x: Around(f, after=noise_where_unsure)),
    "noise now and then": Defence("randomised", lambda f, x: Around(f, noise_now_and_then)),
    "random shift": Defence("randomised", lambda f, x: Around(f, random_shift)),
    "batch statistics": Defence("batch-dependent", lambda f, x: BatchStatistics(f)),
    "minus the batch's mean": Defence("batch-dependent", lambda f, x: Around(f, lambda x: x - x.mean(0) + 0.3)),
    "in training mode": Defence("train-mode", in_train_mode, severity="warning"),
    "partly in training mode": Defence("train-mode", partly_in_train_mode, severity="warning"),
    "constant": Defence("constant-predictions zero-gradients", lambda f, x: Constant()),
    "divides by 255 itself": Defence("constant-predictions", lambda f, x: Around(f, lambda x: x / 255)),
    "given divided images": Defence("pixel-range", lambda f, x: f, lambda x: x / 255),
    "given images times 255": Defence("pixel-range", lambda f, x: f, lambda x: x * 255),
    "given normalised images": Defence("pixel-range", lambda f, x: f, lambda x: (x - 0.5) / 0.5),
    "given plain images": Defence("pixel-range", lambda f, x: f, lambda x: x[:, :, :1, :1].expand_as(x)),
    "given NaN": Defence("pixel-range", lambda f, x: f, lambda x: x.masked_fill(x == x.max(), torch.nan)),
    "ripples": Defence("misleading-gradients", lambda f, x: WaveringInput(f)),
    "gradient turned round": Defence("misleading-gradients", lambda f, x: WrongBackward(f)),
    "steep sigmoids": Defence("vanishing-gradients", lambda f, x: SteepSigmoid(f)),
    "steeper sigmoids": Defence(
        "vanishing-gradients accurate-at-huge-epsilon", lambda f, x: SteepSigmoid(f, steepness=1e3)
    ),
    "gradient made small": Defence(
        "vanishing-gradients", lambda f, x: Around(f, lambda x: 1e-3 * x + 0.999 * x.detach())
    ),
    "small steps hide": Defence("one-step-beats-many", lambda f, x: SmallStepsHide(f, x, hidden=(0.04, 0.19))),
    "purifies with gradients": Defence("optimises-at-inference", lambda f, x: Purifier(f)),
    "refuses odd pixels": Defence("non-finite", lambda f, x: Around(f, refuse_odd_pixels)),
}
