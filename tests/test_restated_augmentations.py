"""Pillow's operations byte for byte, IDBH against a naive per-image reference, and the mixing formulas."""

import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from holdfast.data import colour_shape
from holdfast.data.idbh import (
    COLOUR,
    IDBH,
    OPERATIONS,
    SHAPE,
    apply_colour_shape,
    draw_colour_shape,
    flip_and_crop_shift,
    random_erasing,
)
from holdfast.data.mixing import CutMix, MixUp
from holdfast.errors import HoldfastError
from holdfast.keyed_random import Key

SIZES = [(32, 32), (28, 28), (9, 21), (40, 17), (2, 5), (1, 1)]


def gallery(height: int, width: int, channels: int) -> Tensor:
    """Random images, dark and bright and narrow ones, one level, two levels, ramps, a checkerboard, a single dot."""
    generator = np.random.default_rng(height * 1000 + width * 10 + channels)
    shape = (height, width, channels)
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([(x + (3 + c) * y) % 256 for c in range(channels)], axis=2)
    dot = np.zeros(shape)
    dot[height // 2, width // 2] = 255
    one_flat_channel = generator.integers(0, 256, shape)
    one_flat_channel[..., 0] = 7
    images = [generator.integers(low, high, shape) for low, high in [(0, 256), (0, 40), (200, 256), (99, 103), (0, 2)]]
    images += [np.clip(generator.normal(120, 30, shape), 0, 255), generator.beta(0.2, 0.2, shape) * 255]
    images += [np.full(shape, level) for level in (0, 131, 255)]
    images += [ramp, 255 - ramp, np.broadcast_to(((x + y) % 2 * 255)[..., None], shape), dot, one_flat_channel]
    return torch.from_numpy(np.stack(images).astype(np.uint8))


def to_pil(image: Tensor) -> Image.Image:
    """One image of the batch as Pillow's L or RGB."""
    array = image.numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def by_pillow(pixels: Tensor, operation: Callable[[Image.Image], Image.Image]) -> Tensor:
    """The operation on every image alone."""
    done = [np.asarray(operation(to_pil(image))).reshape(image.shape) for image in pixels]
    return torch.from_numpy(np.stack(done))


def sheared(image: Image.Image, x: float, y: float) -> Image.Image:
    """The inverse of x -> x - tan(x) y, y -> y - tan(y) x about the centre, as torchvision hands it to Pillow."""
    centre_x, centre_y = image.width * 0.5, image.height * 0.5
    inverse = np.linalg.inv(np.array([[1, -math.tan(x)], [-math.tan(y), 1 + math.tan(x) * math.tan(y)]]))
    if not (x and y):
        inverse = np.array([[1.0, math.tan(x)], [math.tan(y), 1.0]])
    (a, b), (d, e) = inverse.tolist()
    matrix = (a, b, centre_x - a * centre_x - b * centre_y, d, e, centre_y - d * centre_x - e * centre_y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=0)


PARAMETERLESS = {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize}
ENHANCERS = {
    "saturation": ImageEnhance.Color,
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


def one_by_pillow(image: Tensor, name: str, magnitude: float, vertical: bool = False) -> Tensor:
    """Any of the eight on one image."""

    def operation(pil: Image.Image) -> Image.Image:
        if name in PARAMETERLESS:
            return PARAMETERLESS[name](pil)
        if name in ENHANCERS:
            return ENHANCERS[name](pil).enhance(magnitude)
        if name == "rotate":
            return pil.rotate(magnitude, Image.Resampling.NEAREST, fillcolor=0)
        return sheared(pil, 0.0 if vertical else magnitude, magnitude if vertical else 0.0)

    return by_pillow(image[None], operation)[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list(ENHANCERS))
def test_enhancers_are_pillows(name: str, size: tuple[int, int], channels: int) -> None:
    pixels = gallery(*size, channels)
    for factor in (0.0, 0.1, 0.37, 0.5, 0.999, 1.0, 1.003, 1.41, 1.9, 2.6):
        ours = getattr(colour_shape, name)(pixels, torch.full((len(pixels),), factor))
        theirs = by_pillow(pixels, lambda image, factor=factor: ENHANCERS[name](image).enhance(factor))
        assert torch.equal(ours, theirs), factor


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [*SIZES, (16, 16), (64, 80)])
@pytest.mark.parametrize("name", list(PARAMETERLESS))
def test_histogram_operations_are_pillows(name: str, size: tuple[int, int], channels: int) -> None:
    pixels = gallery(*size, channels)
    assert torch.equal(getattr(colour_shape, name)(pixels), by_pillow(pixels, PARAMETERLESS[name]))


def test_autocontrast_of_every_range_is_pillows() -> None:
    """Every lowest and highest level there is, with every level between them."""
    ramps = torch.arange(256).repeat(256 * 255 // 2, 1)
    low, high = torch.triu_indices(256, 256, offset=1)
    pixels = ramps.clamp(low[:, None], high[:, None]).to(torch.uint8)[::23, :, None, None]
    assert torch.equal(colour_shape.autocontrast(pixels), by_pillow(pixels, ImageOps.autocontrast))


def test_equalize_where_pillow_clips() -> None:
    """The table runs past 255 when the pixels are few: 511 of them, and step 1."""
    pixels = torch.arange(511).clamp(max=255).to(torch.uint8).reshape(1, 7, 73, 1)
    pixels[0, 0, :73] = 1
    assert torch.equal(colour_shape.equalize(pixels), by_pillow(pixels, ImageOps.equalize))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_rotation_is_pillows(size: tuple[int, int], channels: int) -> None:
    pixels = gallery(*size, channels)[[0, 10]]
    for degrees in (*range(-30, 31), 45, 90, 137.5, 180, 270, -90):
        ours = colour_shape.rotate(pixels, torch.full((2,), float(degrees)))
        theirs = by_pillow(pixels, lambda image, degrees=degrees: image.rotate(degrees))
        assert torch.equal(ours, theirs), degrees


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_shear_is_pillows(size: tuple[int, int], channels: int) -> None:
    pixels = gallery(*size, channels)[[0, 10]]
    angles = [float(angle) for angle in np.linspace(-0.35, 0.35, 29)]
    for x, y in [*((angle, 0.0) for angle in angles), *((0.0, angle) for angle in angles), (0.2, -0.1)]:
        angle_x, angle_y = (torch.full((2,), angle, dtype=torch.float64) for angle in (x, y))
        theirs = by_pillow(pixels, lambda image, x=x, y=y: sheared(image, x, y))
        assert torch.equal(colour_shape.shear(pixels, angle_x, angle_y), theirs), (x, y)


def test_each_image_has_its_own_parameter() -> None:
    pixels = gallery(12, 14, 3)
    factors = torch.linspace(0.1, 1.9, len(pixels))
    for name in ENHANCERS:
        ours = getattr(colour_shape, name)(pixels, factors)
        theirs = [one_by_pillow(image, name, float(f)) for image, f in zip(pixels, factors, strict=True)]
        assert torch.equal(ours, torch.stack(theirs))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", [COLOUR, SHAPE])
def test_what_is_drawn_is_what_pillow_would_do(policy: tuple, channels: int) -> None:
    pixels = gallery(32, 32, channels)[[0, 5, 6, 10]].repeat(75, 1, 1, 1)
    drawn = draw_colour_shape(key=Key(2), index=torch.arange(300), policy=policy)
    assert set(drawn.operation.tolist()) == set(range(8))
    theirs = [
        one_by_pillow(image, OPERATIONS[int(operation)], float(magnitude), bool(vertical))
        for image, operation, magnitude, vertical in zip(pixels, *drawn, strict=True)
    ]
    assert torch.equal(apply_colour_shape(pixels, drawn), torch.stack(theirs))


PUBLISHED = {  # probability, lowest, highest; rotation in whole degrees, the highest included
    "colour": {
        "saturation": (0.125, 0.1, 1.9),
        "brightness": (0.125, 0.5, 1.9),
        "contrast": (0.125, 0.5, 1.9),
        "sharpness": (0.125, 0.1, 1.9),
        "autocontrast": (0.125, 0, 0),
        "equalize": (0.125, 0, 0),
        "shear": (0.125, 0.05, 0.15),
        "rotate": (0.125, 1, 10),
    },
    "shape": {
        "saturation": (0.08, 0.1, 1.9),
        "brightness": (0.08, 0.5, 1.9),
        "contrast": (0.04, 0.5, 1.9),
        "sharpness": (0.08, 0.1, 1.9),
        "autocontrast": (0.04, 0, 0),
        "equalize": (0.08, 0, 0),
        "shear": (0.3, 0.05, 0.35),
        "rotate": (0.3, 1, 30),
    },
}


def near(count: float, draws: int, probability: float) -> bool:
    """Within four and a half standard deviations of a binomial count."""
    return abs(count - draws * probability) <= 4.5 * math.sqrt(draws * probability * (1 - probability))


@pytest.mark.parametrize(("word", "policy"), [("colour", COLOUR), ("shape", SHAPE)])
def test_operations_and_magnitudes_are_drawn_as_published(word: str, policy: tuple) -> None:
    draws = 40000
    drawn = draw_colour_shape(key=Key(5), index=torch.arange(draws), policy=policy)
    for position, name in enumerate(OPERATIONS):
        probability, low, high = PUBLISHED[word][name]
        chosen = drawn.operation == position
        count = int(chosen.sum())
        assert near(count, draws, probability), name
        magnitude = drawn.magnitude[chosen].double()
        size = magnitude.abs()
        turned = name in ("shear", "rotate")
        assert near(int((magnitude < 0).sum()), count, 0.5) if turned else bool((magnitude >= 0).all())
        if turned:
            assert near(int(drawn.vertical[chosen].sum()), count, 0.5)
        if name == "rotate":
            counts = Counter(size.tolist())
            assert set(counts) == set(range(int(low), int(high) + 1))
            assert all(near(seen, count, 1 / (high - low + 1)) for seen in counts.values())
        elif high:
            assert float(size.min()) >= low - 1e-6
            assert float(size.max()) <= high + 1e-6
            tenth = ((size - low) / (high - low) * 10).long().clamp(0, 9)
            assert all(near(seen, count, 0.1) for seen in torch.bincount(tenth, minlength=10).tolist()), name


def naive_crop_shift(image: np.ndarray, high: int, chance: random.Random) -> np.ndarray:
    """Flip, cut a window, pad it on all four sides, cut the original size out: one image, step by step."""
    height, width = image.shape[:2]
    if chance.random() < 0.5:
        image = image[:, ::-1]
    size = chance.randint(0, high - 1)
    cut_x = chance.randint(0, size)
    cut_y = size - cut_x
    top, left = chance.randint(0, cut_y), chance.randint(0, cut_x)
    window = image[top : top + height - cut_y, left : left + width - cut_x]
    padded = np.pad(window, ((cut_y, cut_y), (cut_x, cut_x), (0, 0)))
    top, left = chance.randint(0, cut_y), chance.randint(0, cut_x)
    return padded[top : top + height, left : left + width]


def same_distribution(one: Counter, other: Counter, draws: int) -> bool:
    """Pearson's two-sample statistic of equal numbers of draws, within 4.5 of its standard deviations."""
    kinds = set(one) | set(other)
    statistic = sum((one[kind] - other[kind]) ** 2 / (one[kind] + other[kind]) for kind in kinds)
    assert draws / len(kinds) > 20
    return abs(statistic - (len(kinds) - 1)) <= 4.5 * math.sqrt(2 * (len(kinds) - 1))


def test_crop_shift_and_flip_have_the_distribution_of_a_naive_reference() -> None:
    """Every pixel names its place, so an output tells flip, window and place: 86 outcomes, all of them counted."""
    draws = 12000
    image = np.arange(1, 36, dtype=np.uint8).reshape(5, 7, 1)
    pixels = torch.from_numpy(image).expand(draws, 5, 7, 1)
    ours = flip_and_crop_shift(pixels, key=Key(3), index=torch.arange(draws), high=3)
    chance = random.Random(8)
    naive = Counter(naive_crop_shift(image, 3, chance).tobytes() for _ in range(draws))
    counted = Counter(row.tobytes() for row in ours.numpy())
    assert set(counted) == set(naive)
    assert len(naive) == 86
    assert same_distribution(counted, naive, draws)


@pytest.mark.parametrize(
    ("strength", "side", "high"),
    [("weak", 32, 11), ("strong", 28, 10), ("svhn", 32, 9), ("svhn", 8, 2), ("weak", 4, 2)],
)
def test_sizes_of_the_cut_are_uniform(monkeypatch: pytest.MonkeyPatch, strength: str, side: int, high: int) -> None:
    """White images, with the later two steps out of the way: lost rows plus lost columns are s."""
    monkeypatch.setattr("holdfast.data.idbh.apply_colour_shape", lambda pixels, drawn: pixels)
    monkeypatch.setattr("holdfast.data.idbh.random_erasing", lambda pixels, **_: pixels)
    draws = 6000
    white = torch.full((1, side, side + 3, 1), 255, dtype=torch.uint8).expand(draws, side, side + 3, 1)
    moved = IDBH(strength=strength)(white, key=Key(1), index=torch.arange(draws)).bool()
    rows, columns = moved.any(2).sum(1)[:, 0], moved.any(1).sum(1)[:, 0]
    cut_x, size = side + 3 - columns, 2 * side + 3 - rows - columns
    seen = torch.bincount(size).tolist()
    assert len(seen) == high
    assert all(near(count, draws, 1 / high) for count in seen)
    for s in range(high):
        shares = torch.bincount(cut_x[size == s]).tolist()
        assert len(shares) == s + 1
        assert all(near(count, seen[s], 1 / (s + 1)) for count in shares)


def naive_erased(height: int, width: int, scale: tuple[float, float], chance: random.Random) -> tuple[int, ...]:
    """Top, left, height and width of torchvision's rectangle; zeros where ten tries failed."""
    for _ in range(10):
        area = chance.uniform(*scale) * height * width
        proportion = math.exp(chance.uniform(math.log(0.3), math.log(3.3)))
        tall, wide = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
        if tall < height and wide < width:
            top, left = chance.randint(0, height - tall), chance.randint(0, width - wide)
            return (top, left, tall, wide) if tall and wide else (0, 0, 0, 0)  # nothing black looks the same anywhere
    return 0, 0, 0, 0


def rectangles(pixels: Tensor) -> list[tuple[int, ...]]:
    """The black rectangle of each white image."""
    black = pixels[..., 0] == 0
    rows, columns = black.any(2), black.any(1)
    tall, wide = rows.sum(1), columns.sum(1)
    assert torch.equal(black.sum((1, 2)), tall * wide)
    top = torch.where(tall > 0, rows.int().argmax(1), 0)
    left = torch.where(tall > 0, columns.int().argmax(1), 0)
    return list(zip(top.tolist(), left.tolist(), tall.tolist(), wide.tolist(), strict=True))


@pytest.mark.parametrize(("size", "scale"), [((5, 4), (0.1, 0.9)), ((4, 4), (0.1, 0.33)), ((2, 6), (0.6, 1.0))])
def test_erasing_has_the_distribution_of_a_naive_reference(size: tuple[int, int], scale: tuple[float, float]) -> None:
    """Small images, so that tries fail and every rectangle is counted."""
    draws = 16000
    white = torch.full((1, *size, 3), 255, dtype=torch.uint8).expand(draws, *size, 3)
    ours = random_erasing(white, key=Key(6), index=torch.arange(draws), probability=1, scale=scale)
    chance = random.Random(4)
    naive = Counter(naive_erased(*size, scale, chance) for _ in range(draws))
    assert same_distribution(Counter(rectangles(ours)), naive, draws)


@pytest.mark.parametrize(
    ("strength", "rate", "scale"),
    [
        ("weak", 0.5, (0.02, 0.33)),
        ("strong", 1.0, (0.02, 0.33)),
        ("svhn", 1.0, (0.02, 0.5)),
    ],
)
def test_erasing_rate_and_area(
    monkeypatch: pytest.MonkeyPatch, strength: str, rate: float, scale: tuple[float, float]
) -> None:
    monkeypatch.setattr("holdfast.data.idbh.apply_colour_shape", lambda pixels, drawn: pixels)
    monkeypatch.setattr("holdfast.data.idbh.flip_and_crop_shift", lambda pixels, **_: pixels)
    draws = 8000
    white = torch.full((1, 32, 32, 1), 255, dtype=torch.uint8).expand(draws, 32, 32, 1)
    boxes = rectangles(IDBH(strength=strength)(white, key=Key(7), index=torch.arange(draws)))
    areas = np.array([tall * wide / 1024 for _, _, tall, wide in boxes if tall])
    assert near(len(areas), draws, rate) if rate < 1 else len(areas) == draws
    chance = random.Random(1)
    naive = [naive_erased(32, 32, scale, chance) for _ in range(draws)]
    expected = np.array([tall * wide / 1024 for _, _, tall, wide in naive])
    error = 4.5 * expected.std() * math.sqrt(1 / len(areas) + 1 / draws)
    assert abs(areas.mean() - expected.mean()) < error
    assert scale[0] * 0.6 < areas.min() < scale[0] * 1.5
    assert scale[1] * 0.9 < areas.max() < scale[1] * 1.15


@pytest.mark.parametrize("strength", ["weak", "strong", "svhn"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_keeps_its_draw_in_any_batch(strength: str, channels: int) -> None:
    pixels = gallery(32, 32, channels).repeat(6, 1, 1, 1)
    index = torch.arange(len(pixels)) * 31 + 2
    augment = IDBH(strength=strength)
    before = pixels.clone()
    state = torch.get_rng_state()
    whole = augment(pixels, key=Key(9), index=index)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pixels, before)
    assert whole.shape == pixels.shape
    assert whole.dtype == torch.uint8
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))
    assert torch.equal(augment(pixels[order], key=Key(9), index=index[order]), whole[order])
    for rank in range(4):
        assert torch.equal(augment(pixels[rank::4], key=Key(9), index=index[rank::4]), whole[rank::4])
    assert torch.equal(augment(pixels[:1], key=Key(9), index=index[:1]), whole[:1])
    assert len(augment(pixels[:0], key=Key(9), index=index[:0])) == 0
    changed = (augment(pixels, key=Key(10), index=index) != whole).flatten(1).any(1)
    assert int(changed.sum()) > len(pixels) * 0.6


def test_the_four_steps_come_in_order() -> None:
    """IDBH is its four steps, each with a key of its own."""
    pixels, index = gallery(32, 32, 3), torch.arange(15)
    key = Key(12)
    moved = flip_and_crop_shift(pixels, key=key.fold("crop shift"), index=index, high=9)
    drawn = draw_colour_shape(key=key.fold("colour shape"), index=index, policy=SHAPE)
    expected = random_erasing(
        apply_colour_shape(moved, drawn), key=key.fold("erasing"), index=index, probability=1, scale=(0.02, 0.5)
    )
    assert torch.equal(IDBH(strength="svhn")(pixels, key=key, index=index), expected)


def mixing_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and soft targets of four classes, and those of their partners."""
    generator = torch.Generator().manual_seed(3)
    x, partner_x = torch.rand(2, 5, 3, 12, 20, generator=generator, dtype=torch.float64)
    target, partner_target = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64).softmax(-1)
    return x, target, partner_x, partner_target


def test_mixup_is_one_weighted_mean() -> None:
    x, target, partner_x, partner_target = mixing_batch()
    for step in range(5):
        mixed, soft = MixUp(alpha=0.7).mixed(x, target, partner_x, partner_target, key=Key(0).fold(step))
        share = ((mixed - partner_x) / (x - partner_x)).median()
        assert 0 <= float(share) <= 1
        torch.testing.assert_close(mixed, share * x + (1 - share) * partner_x)
        torch.testing.assert_close(soft, share * target + (1 - share) * partner_target)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_the_share_is_beta_distributed(alpha: float) -> None:
    """Mean 1/2, variance 1 / (4 (2 alpha + 1))."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    drawn = [MixUp(alpha=alpha).mixed(one, zero, 0 * one, zero, key=Key(k))[0].item() for k in range(4000)]
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(np.mean(drawn) - 0.5) < 4.5 * math.sqrt(variance / 4000)
    assert abs(np.var(drawn) / variance - 1) < 0.1


def test_cutmix_pastes_one_box_and_mixes_by_its_area() -> None:
    x, target, partner_x, partner_target = mixing_batch()
    before = x.clone()
    shares, tops, touching = [], [], 0
    for step in range(600):
        mixed, soft = CutMix().mixed(x, target, partner_x, partner_target, key=Key(1).fold(step))
        pasted = (mixed == partner_x).all(dim=1)
        assert torch.equal(pasted, pasted[:1].expand_as(pasted))
        assert torch.equal(torch.where(pasted[:, None], partner_x, x), mixed)
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert int(pasted[0].sum()) == int(rows.sum() * columns.sum())
        share = pasted[0].double().mean()
        torch.testing.assert_close(soft, (1 - share) * target + share * partner_target)
        shares.append(float(share))
        if share:
            tops.append(int(rows.int().argmax()))
            touching += bool(rows[0] | rows[-1] | columns[0] | columns[-1])
    assert torch.equal(x, before)
    assert max(shares) > 0.7
    assert set(tops) >= set(range(9))
    assert 100 < touching < 600
    chance = random.Random(5)
    expected = [naive_cutmix_share(12, 20, chance) for _ in range(20000)]
    assert abs(np.mean(shares) - np.mean(expected)) < 4.5 * np.std(expected) / math.sqrt(600)
    assert abs(np.std(shares) / np.std(expected) - 1) < 0.12


def naive_cutmix_share(height: int, width: int, chance: random.Random) -> float:
    """Area of a clipped box by counting its pixels on each axis."""
    side = math.sqrt(1 - chance.random())
    area = 1
    for length in (height, width):
        half, centre = int(length * side) // 2, chance.randrange(length)
        area *= sum(centre - half <= place < centre + half for place in range(length))
    return area / (height * width)


def test_cutmix_happens_with_its_probability() -> None:
    x, target, partner_x, partner_target = mixing_batch()

    def untouched(probability: float, step: int) -> bool:
        part = CutMix(probability=probability)
        mixed, soft = part.mixed(x, target, partner_x, partner_target, key=Key(2).fold(step))
        return mixed is x and soft is target

    assert near(sum(untouched(0.3, step) for step in range(1000)), 1000, 0.7)
    assert all(untouched(0, step) for step in range(50))
    assert not any(untouched(1, step) for step in range(50))


def test_mixing_follows_its_key_alone() -> None:
    batch = mixing_batch()
    for part in (MixUp(), CutMix()):
        state = random.getstate()
        first, again, other = (part.mixed(*batch, key=Key(k))[0] for k in (3, 3, 4))
        assert random.getstate() == state
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        half = part.mixed(*(tensor[::2] for tensor in batch), key=Key(3))[0]
        assert torch.equal(half, first[::2])


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: IDBH(strength="strnog"), "IDBH strength 'strnog' is unknown: did you mean strong"),
        (lambda: IDBH(strength="x"), "use one of weak, strong, svhn"),
        (lambda: MixUp(alpha=0), "MixUp alpha is 0: give a positive number"),
        (lambda: CutMix(alpha=-1), "CutMix alpha is -1: give a positive number"),
        (lambda: CutMix(alpha=math.nan), "CutMix alpha is nan"),
        (lambda: MixUp(alpha=math.inf), "MixUp alpha is inf"),
        (lambda: CutMix(probability=1.5), r"probability is 1.5: give a number in \[0, 1\]"),
        (lambda: CutMix(probability=math.nan), "probability is nan"),
    ],
)
def test_refusals(build: Callable[[], object], says: str) -> None:
    with pytest.raises(HoldfastError, match=says):
        build()


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(2, 8, 8, 3), torch.zeros(2, 8, 8, 4, dtype=torch.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8)],
)
def test_idbh_refuses_what_is_no_batch_of_images(pixels: Tensor) -> None:
    with pytest.raises(HoldfastError, match="give uint8 pixels"):
        IDBH()(pixels, key=Key(0), index=torch.arange(len(pixels)))
