"""The data sources by name, one line each; imports nothing, so that listing them is instant."""

from __future__ import annotations

SOURCES: dict[str, str] = {
    "digits": "8×8 grey handwritten digits, 1,437 + 360 images, shipped with the package",
    "idx": "PATH of a folder with the four IDX files of MNIST or Fashion-MNIST, .gz or unpacked",
    "cifar": "PATH of CIFAR-10 or CIFAR-100 as published: binary or Python version, folder or .tar.gz",
    "svhn": "PATH of a folder with train_32x32.mat and test_32x32.mat",
    "npz": "PATH of an .npz file with x_train, y_train, x_test, y_test, or x and y",
    "parquet": "PATH of a folder with Parquet files laid out as on the Hugging Face Hub, or a saved DatasetDict",
    "folder": "PATH of a folder with one folder of images a class, with or without train/ and test/ above",
}
"""What ``holdfast list data`` prints. Only names in ``NAMED`` are sources by themselves; the others are formats."""

NAMED: frozenset[str] = frozenset({"digits"})
"""Sources that are asked for by name; every other source is a path."""
