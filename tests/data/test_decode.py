"""Decoding: exact pixels, grey among RGB, 16 bits, orientation, transparency, sizes and damage."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from holdfast.data import decode
from holdfast.data.decode import Encoded, decode_images, plan_decoding, resize_pixels
from holdfast.errors import HoldfastError

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image, name="a", kind="PNG", **options) -> Encoded:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Encoded(name, file.getvalue())


def decoded(*items, image_size=None) -> tuple[np.ndarray, tuple[str, ...]]:
    plan = plan_decoding(items, image_size)
    return decode_images(items, plan).numpy(), plan.notes


def test_rgb_is_exact():
    pixels, notes = decoded(encoded(RGB), encoded(255 - RGB))
    assert np.array_equal(pixels, np.stack([RGB, 255 - RGB]))
    assert notes == ()


def test_files_are_read_like_bytes(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert np.array_equal(decoded(Encoded("a", tmp_path / "a.png"))[0][0], RGB)


def test_all_grey_stays_grey_and_one_rgb_makes_all_rgb():
    grey = RGB[..., 0]
    assert np.array_equal(decoded(encoded(grey))[0], grey[None, ..., None])
    pixels, notes = decoded(encoded(grey), encoded(RGB))
    assert np.array_equal(pixels, np.stack([np.repeat(grey[..., None], 3, axis=2), RGB]))
    assert notes == ("1 of 2 images are grey and are converted to RGB like the others.",)


def test_sixteen_bits_are_scaled_and_not_clipped():
    deep = np.array([[0, 257, 65535], [128 * 257 + 100, 1000, 30000]], dtype=np.uint16)
    expected = np.array([[0, 1, 255], [128, 4, 117]], dtype=np.uint8)
    assert np.array_equal(decoded(encoded(deep))[0][0, ..., 0], expected)
    in_rgb = decoded(encoded(deep), encoded(RGB[:2, :3]))[0][0]
    assert np.array_equal(in_rgb, np.repeat(expected[..., None], 3, axis=2))


def test_one_bit_becomes_black_and_white():
    bits = RGB[..., 0] > 128
    assert np.array_equal(decoded(encoded(Image.fromarray(bits)))[0][0, ..., 0], bits * np.uint8(255))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpegs_are_turned_upright(orientation):
    # bright in the stored top left corner only; where that belongs when upright, by the EXIF standard
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255
    corner = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "TL", 6: "TR", 7: "BR", 8: "BL"}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, _ = decoded(encoded(stored, kind="JPEG", exif=exif, quality=95))
    assert pixels.shape[1:3] == ((16, 32) if orientation < 5 else (32, 16))
    top, left = corner[0] == "T", corner[1] == "L"
    assert pixels[0, 2 if top else -3, 2 if left else -3].min() > 200
    assert pixels[0, -3 if top else 2, -3 if left else 2].max() < 50


def test_transparency_is_dropped_and_told():
    alpha = np.concatenate([RGB, np.full((5, 7, 1), 128, np.uint8)], axis=2)
    pixels, notes = decoded(encoded(alpha))
    assert np.array_equal(pixels[0], RGB)
    assert notes == ("1 of 1 images have transparency, which is dropped.",)


def test_palettes_with_transparency_do_not_warn():
    paletted = Image.fromarray(RGB).quantize(16)
    pixels, notes = decoded(encoded(paletted, transparency=bytes([0, 128] * 8)))
    assert np.array_equal(pixels[0], np.asarray(paletted.convert("RGB")))
    assert "transparency" in notes[0]


def test_resizing_cuts_the_centre_at_the_shorter_side():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = (10, 200, 30)
    pixels, notes = decoded(encoded(wide), encoded(wide.transpose(1, 0, 2)), image_size=4)
    assert np.array_equal(pixels, np.broadcast_to(np.array([10, 200, 30], np.uint8), (2, 4, 4, 3)))
    assert notes == ("Images are resized to 4×4: shorter side, then centre.",)


def test_images_of_the_right_size_are_left_alone():
    square = RGB[:5, :5]
    pixels, notes = decoded(encoded(square), image_size=5)
    assert np.array_equal(pixels[0], square)
    assert notes == ()


def test_shrinking_averages():
    """Antialiasing: of a fine checkerboard only its mean is left."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels, _ = decoded(encoded(board), image_size=8)
    assert pixels.min() > 120
    assert pixels.max() < 135


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_pixels_follows_the_same_rule(channels):
    arrays = np.random.default_rng(1).integers(0, 256, (3, 9, 14, channels), dtype=np.uint8)
    items = [encoded(array[..., 0] if channels == 1 else array) for array in arrays]
    assert np.array_equal(resize_pixels(torch.from_numpy(arrays), 6).numpy(), decoded(*items, image_size=6)[0])


def test_threads_keep_the_order(monkeypatch):
    monkeypatch.setattr(decode, "_LARGE", 1)
    monkeypatch.setattr(decode, "_CHUNK", 3)
    arrays = [np.full((4, 6), value, np.uint8) for value in range(20)]
    items = [encoded(array) for array in arrays]
    monkeypatch.setattr(decode, "_cores", lambda: 3)
    assert plan_decoding(items).threads == 3
    assert decoded(*items)[0][:, 0, 0, 0].tolist() == list(range(20))
    broken = Encoded("item 13", items[13].source[:-30])
    with pytest.raises(HoldfastError, match="item 13 cannot be read"):
        decoded(*items[:13], broken, *items[14:])


def test_mixed_sizes_need_an_image_size():
    with pytest.raises(HoldfastError, match=r"sizes differ, first is 5×7 and second is 7×5 .*: give --image-size N"):
        decoded(encoded(RGB, "first"), encoded(RGB.transpose(1, 0, 2), "second"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no image at all", "broken cannot be read .not an image in one of the formats PNG, .*: replace or remove it"),
        (b"", "broken cannot be read"),
        (encoded(RGB).source[:60], "broken cannot be read"),
        (encoded(np.tile(RGB, (30, 30, 1)), kind="JPEG").source[:-900], "broken cannot be read .*truncated"),
    ],
)
def test_refuses_damage_by_name(source, message):
    with pytest.raises(HoldfastError, match=message):
        decoded(Encoded("broken", source))


def test_refuses_floating_point_images():
    with pytest.raises(HoldfastError, match="a: floating-point images have no scale"):
        decoded(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), kind="TIFF"))


def test_refuses_grey_values_beyond_16_bits():
    with pytest.raises(HoldfastError, match="a: a grey image has values outside 0 to 65535"):
        decoded(encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), kind="TIFF"))


def test_refuses_nothing_and_absurd_sizes():
    with pytest.raises(HoldfastError, match="there are no images"):
        plan_decoding([])
    with pytest.raises(HoldfastError, match="image size is 0: give --image-size a positive number"):
        plan_decoding([encoded(RGB)], 0)
    with pytest.raises(HoldfastError, match="image size is -3"):
        resize_pixels(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), -3)
