"""Eight image operations of Pillow for a whole batch of uint8 images at once, on the device that holds it.

Every function gives what Pillow 9.4 to 13 gives, byte for byte, for grey (L) and colour (RGB) images, each image of the
batch with its own parameter. The reference augmentations call Pillow on one image at a time; the same roundings here,
truncations included, keep a recipe's published augmentation what it was.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _to_luma(pixels: Tensor) -> Tensor:
    """Pillow's "L" of a batch: ITU-R 601 weights in 16-bit fixed point, (B, H, W, 1) int32."""
    wide = pixels.to(torch.int32)
    if pixels.shape[3] == 1:
        return wide
    red, green, blue = wide.split(1, dim=3)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(degenerate: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend: degenerate + factor * (pixels - degenerate) in single precision, clipped, then truncated."""
    base = degenerate.to(torch.float32)
    value = factor.to(torch.float32)[:, None, None, None] * (pixels.to(torch.float32) - base)
    return (value + base).clamp_(0, 255).to(torch.uint8)  # two roundings, as in C: no fused multiply-add


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    r"""Move every image from its grey version (0) to itself (1) and beyond, as `PIL.ImageEnhance.Color`.

    .. math:: x' = \lfloor \mathrm{clip}(L(x) + f\,(x - L(x))) \rfloor

    Args:
        pixels: A batch of images. Grey ones stay as they are.
        factor: f of each image.

    Shapes:
        pixels: (B, H, W, C) uint8, C 1 or 3; factor: (B,). Returns the shape of `pixels`.

    Example:
        >>> red = torch.tensor([[[[200, 0, 0]]]], dtype=torch.uint8)
        >>> saturation(red, torch.tensor([0.0])).flatten().tolist()
        [60, 60, 60]
    """
    if pixels.shape[3] == 1:
        return pixels
    return _blend(_to_luma(pixels), pixels, factor)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    r"""Scale every image, as `PIL.ImageEnhance.Brightness`.

    .. math:: x' = \lfloor \mathrm{clip}(f\,x) \rfloor

    Args:
        pixels: A batch of images.
        factor: f of each image; 0 is black, 1 changes nothing.

    Shapes:
        pixels: (B, H, W, C) uint8, C 1 or 3; factor: (B,). Returns the shape of `pixels`.

    Example:
        >>> pair = torch.tensor([[[[101], [200]]]], dtype=torch.uint8)
        >>> brightness(pair, torch.tensor([1.5])).flatten().tolist()
        [151, 255]
    """
    return _blend(torch.zeros_like(pixels), pixels, factor)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    r"""Move every image from its mean grey level (0) to itself (1) and beyond, as `PIL.ImageEnhance.Contrast`.

    .. math:: x' = \lfloor \mathrm{clip}(m + f\,(x - m)) \rfloor, \qquad m = \lfloor \mathrm{mean}(L(x)) + 1/2 \rfloor

    Args:
        pixels: A batch of images.
        factor: f of each image.

    Shapes:
        pixels: (B, H, W, C) uint8, C 1 or 3; factor: (B,). Returns the shape of `pixels`.

    Example:
        >>> pair = torch.tensor([[[[100], [151]]]], dtype=torch.uint8)
        >>> contrast(pair, torch.tensor([0.0])).flatten().tolist()
        [126, 126]
    """
    count = pixels.shape[1] * pixels.shape[2]
    total = _to_luma(pixels).sum(dim=(1, 2, 3), keepdim=True)
    return _blend((2 * total + count) // (2 * count), pixels, factor)


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    r"""Move every image from its smoothed version (0) to itself (1) and beyond, as `PIL.ImageEnhance.Sharpness`.

    .. math:: x' = \lfloor \mathrm{clip}(S(x) + f\,(x - S(x))) \rfloor

    S averages the 3x3 neighbourhood with weight 5 in the middle and 1 elsewhere, rounds, and leaves the border's
    pixels as they are.

    Args:
        pixels: A batch of images.
        factor: f of each image.

    Shapes:
        pixels: (B, H, W, C) uint8, C 1 or 3; factor: (B,). Returns the shape of `pixels`.

    Example:
        >>> dot = torch.zeros(1, 3, 3, 1, dtype=torch.uint8)
        >>> dot[0, 1, 1] = 130
        >>> sharpness(dot, torch.tensor([0.0]))[0, 1].flatten().tolist()
        [0, 50, 0]
    """
    wide = pixels.to(torch.int32)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    smooth = wide.clone()
    smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26  # a sum over 13 is never half-way, so this is Pillow's rounding
    return _blend(smooth, pixels, factor)


def autocontrast(pixels: Tensor) -> Tensor:
    r"""Stretch every channel of every image to 0 … 255, as `PIL.ImageOps.autocontrast` with its defaults.

    .. math:: x' = \lfloor s\,x - s\,x_{\min} \rfloor, \qquad s = 255 / (x_{\max} - x_{\min})

    A channel of one level stays as it is.

    Args:
        pixels: A batch of images.

    Shapes:
        pixels: (B, H, W, C) uint8, C 1 or 3. Returns its shape.

    Example:
        >>> three = torch.tensor([[[[10], [20], [40]]]], dtype=torch.uint8)
        >>> autocontrast(three).flatten().tolist()
        [0, 85, 255]
    """
    low, high = pixels.amin(dim=(1, 2), keepdim=True).double(), pixels.amax(dim=(1, 2), keepdim=True).double()
    # Pillow's own steps in double precision: a number divided by a tensor is its reciprocal times the number in torch,
    # and any other rounding truncates to another integer now and then.
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    stretched = (pixels.double() * scale + -low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, pixels)


def equalize(pixels: Tensor) -> Tensor:
    r"""Flatten the histogram of every channel of every image, as `PIL.ImageOps.equalize`.

    .. math:: x' = \min\left(255, \left\lfloor \frac{\lfloor q/2 \rfloor + \#\{x_i < x\}}{q} \right\rfloor\right),
        \qquad q = \lfloor \#\{x_i < x_{\max}\} / 255 \rfloor

    A channel with q = 0 (one level, or few pixels) stays as it is.

    Args:
        pixels: A batch of images.

    Shapes:
        pixels: (B, H, W, C) uint8, C 1 or 3. Returns its shape.

    Example:
        >>> half = torch.zeros(1, 16, 32, 1, dtype=torch.uint8)
        >>> half[:, 8:] = 3
        >>> equalize(half).unique().tolist()
        [0, 255]
    """
    count, height, width, channels = pixels.shape
    levels = pixels.permute(0, 3, 1, 2).reshape(count, channels, height * width).long()
    histogram = levels.new_zeros(count, channels, 256).scatter_add_(2, levels, torch.ones_like(levels))
    brightest = histogram.gather(2, levels.amax(dim=2, keepdim=True))
    step = (height * width - brightest) // 255
    below = histogram.cumsum(dim=2) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=pixels.device))
    flat = table.gather(2, levels).to(torch.uint8)
    return flat.reshape(count, channels, height, width).permute(0, 2, 3, 1).contiguous()


def taken(pixels: Tensor, rows: Tensor, columns: Tensor, inside: Tensor) -> Tensor:
    """Every output pixel from its source pixel in the same image, 0 where it has none.

    Args:
        pixels: A batch of images.
        rows: Source row of each output pixel.
        columns: Source column of each output pixel.
        inside: Whether there is a source; where not, row and column may be anything.

    Shapes:
        pixels: (B, H, W, C), any type; the others broadcast together to (B, H, W). Returns the shape of `pixels`.

    Example:
        >>> pair = torch.tensor([[[[5], [6]]]])
        >>> taken(pair, torch.tensor([[[0, 0]]]), torch.tensor([[[1, 2]]]), torch.tensor([[[True, False]]])).flatten()
        tensor([6, 0])
    """
    count, height, width, channels = pixels.shape
    image = torch.arange(count, device=pixels.device)[:, None, None]
    # One black pixel at the end: an index to it is several times faster than a mask over the channels.
    flat = torch.cat([pixels.flatten(0, 2), pixels.new_zeros(1, channels)])
    source = torch.where(inside, (image * height + rows) * width + columns, count * height * width)
    return flat.index_select(0, source.flatten()).reshape(pixels.shape)


def _affine(pixels: Tensor, matrix: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Map every output pixel back through a 2x2 matrix about the image's centre; the nearest pixel, 0 outside.

    Pillow walks over the output in 16-bit fixed point from the centre of its first pixel. The same integers here give
    the same source pixel.

    Args:
        pixels: A batch of images.
        matrix: a, b, d, e of x_in = a x + b y + c, y_in = d x + e y + f, each (B,) float64.
    """
    _, height, width, _ = pixels.shape

    def fixed(value: Tensor) -> Tensor:
        """In units of 2^-16, rounded."""
        return torch.floor(value * 65536 + 0.5).long()[:, None, None]

    def source(along_x: Tensor, along_y: Tensor, centre: float) -> Tensor:
        """Where each output pixel comes from on one axis."""
        start = along_x * (-width * 0.5) + along_y * (-height * 0.5) + centre
        start = start + along_x * 0.5 + along_y * 0.5
        return (fixed(start) + columns * fixed(along_x) + rows * fixed(along_y)) >> 16

    columns = torch.arange(width, device=pixels.device)[None, None, :]
    rows = torch.arange(height, device=pixels.device)[None, :, None]
    a, b, d, e = matrix
    x, y = source(a, b, width * 0.5), source(d, e, height * 0.5)
    return taken(pixels, y, x, (x >= 0) & (x < width) & (y >= 0) & (y < height))


def shear(pixels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    r"""Shear every image about its centre, as torchvision's `affine` does through Pillow (nearest, 0 outside).

    .. math:: x_{in} = (1 + \tan x \tan y)\,x_{out} + \tan x\; y_{out}, \qquad
        y_{in} = \tan y\; x_{out} + y_{out}

    Coordinates are measured from the centre (W/2, H/2).

    Args:
        pixels: A batch of images.
        x: Angle of each image along the rows.
        y: Angle of each image along the columns.

    Shapes:
        pixels: (B, H, W, C) uint8; x, y: (B,). Returns the shape of `pixels`.
    Units:
        Angles in radians.

    Example:
        >>> column = torch.tensor([0, 9, 0], dtype=torch.uint8).expand(1, 3, 3)[..., None]
        >>> shear(column, torch.tensor([0.785]), torch.tensor([0.0]))[0, :, :, 0].tolist()
        [[0, 0, 9], [0, 9, 0], [9, 0, 0]]
    """
    along_x, along_y = torch.tan(x.double()), torch.tan(y.double())
    return _affine(pixels, (1 + along_x * along_y, along_x, along_y, torch.ones_like(along_x)))


def rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    r"""Turn every image counter-clockwise about its centre, as `PIL.Image.rotate` (nearest, 0 outside, same size).

    .. math:: x_{in} = \cos a\; x_{out} - \sin a\; y_{out}, \qquad y_{in} = \sin a\; x_{out} + \cos a\; y_{out}

    Coordinates are measured from the centre (W/2, H/2), y downwards.

    Args:
        pixels: A batch of images.
        degrees: a of each image.

    Shapes:
        pixels: (B, H, W, C) uint8; degrees: (B,). Returns the shape of `pixels`.
    Units:
        Angles in degrees.

    Example:
        >>> square = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)[None, :, :, None]
        >>> rotate(square, torch.tensor([90]))[0, :, :, 0].tolist()
        [[2, 4], [1, 3]]
    """
    angle = torch.deg2rad(degrees.double())
    cosine, sine = torch.cos(angle), torch.sin(angle)
    return _affine(pixels, (cosine, -sine, sine, cosine))
