"""A pickle may name anything and call it; none of that may happen here."""

from __future__ import annotations

import os
import pickle
import struct

import numpy as np
import pytest

from holdfast.data.inert_pickle import load_inert
from holdfast.errors import HoldfastError

ARRAY = np.arange(12, dtype=np.uint8).reshape(3, 4)


def python2_array(array: np.ndarray, module: bytes = b"numpy.core.multiarray") -> bytes:
    """A uint8 array as Python 2's cPickle wrote it at protocol 2, opcode by opcode."""
    rows, columns = array.shape
    raw = array.tobytes()
    return b"".join(
        [
            b"c" + module + b"\n_reconstruct\n",
            b"cnumpy\nndarray\n" + b"K\x00\x85" + b"U\x01b" + b"\x87R",  # _reconstruct(ndarray, (0,), "b")
            b"(K\x01" + b"M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86",
            b"cnumpy\ndtype\n"
            + b"U\x02u1K\x00K\x01\x87R"
            + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"I00\n" + b"T" + struct.pack("<I", len(raw)) + raw + b"tb",
        ]
    )


def python2_dict(items: dict[bytes, bytes]) -> bytes:
    """{key: value}, the values already as opcodes."""
    body = b"".join(b"U" + bytes([len(key)]) + key + value for key, value in items.items())
    return b"\x80\x02}(" + body + b"u."


class Runs:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo run > {self.path}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_todays_numpy(protocol, order):
    array = np.asarray(ARRAY, order=order)
    if protocol == 5:
        with pytest.raises(HoldfastError, match=r"_frombuffer, which image data does not need"):
            load_inert(pickle.dumps({"data": array}, protocol), "here")
        return
    loaded = load_inert(pickle.dumps({"data": array, "labels": [3, 1]}, protocol), "here")
    assert np.array_equal(loaded["data"], ARRAY)
    assert loaded["labels"] == [3, 1]


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_of_python_2(module):
    loaded = load_inert(python2_dict({b"data": python2_array(ARRAY, module), b"n": b"K\x07"}), "here")
    assert np.array_equal(loaded[b"data"], ARRAY)
    assert loaded[b"n"] == 7


def test_the_hand_written_pickle_is_a_true_one():
    """NumPy itself reads it, so the format in these tests is the published one."""
    assert np.array_equal(pickle.loads(python2_dict({b"data": python2_array(ARRAY)}), encoding="bytes")[b"data"], ARRAY)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_not_run(tmp_path, protocol):
    witness = tmp_path / "witness"
    raw = pickle.dumps({"data": ARRAY, "labels": [Runs(witness)]}, protocol)
    with pytest.raises(HoldfastError, match=r"batch: the pickle asks for \w+.system, .* nothing was run: do not trust"):
        load_inert(raw, "batch")
    assert not witness.exists()
    pickle.loads(raw)  # the trap is live: the ordinary reader runs it
    assert witness.exists()


@pytest.mark.parametrize(
    "name",
    [
        b"builtins\neval",
        b"__builtin__\ngetattr",
        b"numpy\nload",
        b"numpy\nfromfile",
        b"numpy.core.multiarray\nfromfile",
        b"numpy\nndarray.tofile",
        b"_codecs\ndecode",
        b"codecs\nopen",
    ],
)
def test_every_other_name_is_refused(name):
    with pytest.raises(HoldfastError, match="which image data does not need, and nothing was run"):
        load_inert(b"\x80\x02c" + name + b"\n.", "here")


def test_stand_ins_cannot_be_changed():
    set_defaults = b"\x80\x02c_codecs\nencode\nN}U\x0c__defaults__K\x01\x85s\x86b."
    with pytest.raises(HoldfastError, match="tries to change a function"):
        load_inert(set_defaults, "here")
    with pytest.raises(HoldfastError, match="not a readable pickle"):
        load_inert(b"\x80\x02cnumpy\nndarray\n}U\x05arrayK\x01sb.", "here")
    assert np.array_equal(load_inert(pickle.dumps(ARRAY, 2), "here"), ARRAY)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (pickle.dumps({"data": ARRAY.astype(np.float32)}, 2), "here: array of type .*f4.*only unsigned bytes are read"),
        (pickle.dumps({"data": ARRAY}, 2)[:-30], r"here is not a readable pickle .*download it again"),
        (b"", "here is not a readable pickle"),
        (b"not a pickle", "here is not a readable pickle"),
        (
            python2_dict({b"d": python2_array(ARRAY).replace(b"M\x03\x00", b"M\x09\x00")}),
            "here is not a readable pickle",
        ),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nK\x00\x85R.", "here: array of an unknown kind"),
        (
            b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R.",
            "bytes encoded in an unknown way",
        ),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "here: array without content"),
        (b"\x80\x02cnumpy\nndarray\n)\x81K\x01\x85b.", "here: array state of an unknown form"),
    ],
)
def test_refuses_other_types_and_damage(raw, message):
    with pytest.raises(HoldfastError, match=message):
        load_inert(raw, "here")
