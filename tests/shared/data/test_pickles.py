"""DeepLense's pickled object arrays are read, and nothing of any pickle is run."""

import contextlib
import copyreg
import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data import pickles
from shared.data.pickles import load_object_array
from shared.data.prepare import prepare
from shared.errors import UserError

LENS = np.random.default_rng(0).random((5, 7))


def pair(image: object, mass: object) -> np.ndarray:
    array = np.empty(2, dtype=object)
    array[0], array[1] = image, mass
    return array


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2", "u1", ">i2", "<i8"])
def test_arrays_of_every_protocol_and_of_both_numpys_are_read(protocol, core, dtype):
    image = (LENS * 99).astype(dtype)
    for stored, mass in ((image, 1.5e-23), (np.asfortranarray(image), np.float64(1.5e-23)), (image, np.array(2))):
        content = pickle.dumps(pair(stored, mass), protocol)
        for one, other in ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", core)):
            # As the other version of numpy writes it: the name, and before it its length where the protocol has one.
            for name in (b"multiarray", b"numeric"):
                old, new = one + name, other + name
                content = content.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
                content = content.replace(b"c" + old + b"\n", b"c" + new + b"\n")
        assert core in content
        if protocol > 3:  # the frame's length no longer fits: an old writer may write none
            content = content[:2] + content[11:] if content[2:3] == b"\x95" else content
        found, number = load_object_array(content)
        np.testing.assert_array_equal(found, image)
        assert found.dtype == image.dtype
        assert number == float(mass)


def npy_of(content: bytes, shape: tuple[int, ...] = (2,)) -> bytes:
    stream = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + content


def test_axion_files_become_images_with_their_mass(tmp_path, capsys):
    folder = tmp_path / "in"
    for name in ("axion", "cdm"):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        np.save(folder / "axion" / f"a{i}.npy", pair(LENS + i, 10.0**-i * 1e-22))
        np.save(folder / "cdm" / f"c{i}.npy", LENS - i)
    cache = prepare(folder, tmp_path / "out")
    np.testing.assert_array_equal(cache.images[:4, 0], np.stack([LENS + i for i in range(4)]).astype(np.float32))
    mass = cache.index["parameters"]["axion_mass"]
    assert mass["unit"] == "eV"
    assert mass["values"] == [*(10.0**-i * 1e-22 for i in range(4)), None, None, None, None]
    assert cache.index["classes"] == ["axion", "cdm"]
    assert "axion_mass  4 values: 1e-25 to 1e-22 eV" in capsys.readouterr().out


class Calls:
    def __init__(self, function: Callable, *arguments: object):
        self.made = function, arguments

    def __reduce__(self) -> tuple:
        return self.made


class Builds:
    """Unpickled by calling `function`, and then given this state."""

    def __init__(self, function: Callable, arguments: tuple, state: object):
        self.made = function, arguments, state

    def __reduce__(self) -> tuple:
        return self.made


class Named:
    pass


def raw(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


NDARRAY, DTYPE = name("numpy", "ndarray"), name("numpy", "dtype")
RECONSTRUCT = name("numpy._core.multiarray", "_reconstruct")
SCALAR = name("numpy._core.multiarray", "scalar")
EMPTY = RECONSTRUCT + b"(" + NDARRAY + b"K\x00\x85C\x01btR"
FLOAT = DTYPE + b"(" + text("f8") + b"\x89\x88tR"


def hostile(command: str, target: Path) -> dict[str, bytes]:
    """Pickles that would make the folder `target`, or do other harm."""
    nested = pair(LENS, 0.0)
    nested[1] = np.array([Calls(os.mkdir, str(target)), 1], dtype=object)
    system = name("os", "system") + text(command) + b"\x85R"
    dumped = pickle.dumps(Calls(os.mkdir, str(target)))
    evil = [
        Calls(os.mkdir, str(target)),
        Calls(os.system, command),
        Calls(eval, f"__import__('os').system({command!r})"),
    ]
    return {
        **{f"reduce {i}": pickle.dumps(pair(LENS, item)) for i, item in enumerate(evil)},
        **{f"protocol {i}": pickle.dumps(pair(LENS, evil[0]), i) for i in range(6)},
        "bare": dumped,
        "nested": pickle.dumps(nested),
        "in a list": pickle.dumps(pair([Calls(os.mkdir, str(target))], 1.0)),
        "as the state": pickle.dumps(Builds(np.dtype, ("f8",), Calls(os.mkdir, str(target)))),
        "a name within a name": raw(name("numpy", "f2py.os.system"), text(command), b"\x85R"),
        "a name of numpy that runs": raw(name("numpy.testing._private.utils", "runstring"), text(command), b"}\x86R"),
        "inst": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": raw(b"(", name("os", "system"), text(command), b"o"),
        "newobj": raw(name("subprocess", "Popen"), text(command), b"\x85\x81"),
        "newobj of ours": raw(DTYPE, text("f8"), b"\x85\x81"),
        "extension": raw(b"\x82\x7b"),
        "persistent": raw(text(command), b"Q"),
        "a scalar of objects": raw(
            SCALAR, DTYPE, b"(", text("O8"), b"\x89\x88tR", b"C" + bytes([len(dumped)]) + dumped, b"\x86R"
        ),
        "a subclass": raw(RECONSTRUCT, b"(", name("numpy", "memmap"), b"K\x00\x85C\x01btR"),
        "a subclass by call": raw(RECONSTRUCT, b"(", name("numpy", "matrix"), b"K\x00\x85C\x01btR"),
        "build on a function": raw(RECONSTRUCT, b"}", text("__call__"), system, b"s", b"b"),
        "build on a type": raw(NDARRAY, b"N}", text("__class__"), FLOAT, b"s\x86b"),
        "build on a function without a dictionary": raw(RECONSTRUCT, NDARRAY, b"b"),
        "setting attributes": raw(EMPTY, b"N}", text("shape"), b"K\x01s\x86b"),
        "objects from bytes": raw(
            EMPTY, b"(K\x01K\x02\x85", DTYPE, b"(", text("O8"), b"\x89\x88tR\x89C\x10" + b"A" * 16 + b"tb"
        ),
        "a structured type": raw(DTYPE, b"(", text("V8"), b"\x89\x88tR"),
        "a type of fields": raw(
            FLOAT, b"(K\x03", text("<"), b"N]", text("x"), b"aNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        ),
        "a large array": raw(NDARRAY, b"J\xff\xff\xff\x7f\x85R"),
        "a shape that lies": raw(EMPTY, b"(K\x01J\xff\xff\xff\x7f\x85", FLOAT, b"\x89C\x08" + bytes(8), b"tb"),
        "a negative shape": raw(EMPTY, b"(K\x01J\xff\xff\xff\xff\x85", FLOAT, b"\x89C\x08" + bytes(8), b"tb"),
        "a large memory": raw(b"K\x01r\xff\xff\xff\x7f"),
        "a large memory in text": b"K\x01p2000000000\n.",
        "large bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
        "a large frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
        "a large bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"x.",
        "hash of doubled tuples": raw(b"}K\x01\x85", *[b"2\x86"] * 60, b"K\x01s"),
        "a number too large": pickle.dumps(pair(LENS, 10**400)),
        "a decoder": raw(name("_codecs", "encode"), text("a"), text("zip"), b"\x86R"),
        "another codec function": raw(name("_codecs", "decode"), text("a"), text("unicode_escape"), b"\x86R"),
        "cut": pickle.dumps(pair(LENS, 1.0))[:-30],
        "empty": b"",
        "text": b"lens",
        "a dictionary": pickle.dumps({"image": LENS}),
        "a class of its own": pickle.dumps(pair(LENS, Named())),
        "text beside the image": pickle.dumps(pair(LENS, "heavy")),
        "itself": raw(b"]\x94h\x00a"),
    }


NAMES = list(hostile("true", Path("target")))


@pytest.mark.parametrize("which", NAMES)
def test_a_hostile_pickle_is_an_error_and_does_nothing(tmp_path, monkeypatch, which):
    target = tmp_path / "owned"
    content = hostile(f"mkdir {target}", target)[which]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.npy").write_bytes(npy_of(content))
    np.save(tmp_path / "in" / "b.npy", LENS)
    before = dict(vars(np)), {key: value._call for key, value in pickles._STAND_INS.items()}
    monkeypatch.setitem(copyreg._inverted_registry, 0x7B, ("os", "getcwd"))
    with pytest.raises(ValueError, match="is a pickle"):
        load_object_array(content)
    with pytest.raises(UserError, match=r"1 of 2 images .*\n  a.npy: is a pickle") as caught:
        prepare(tmp_path / "in", tmp_path / "out")
    assert str(caught.value).count("\n") == 1
    assert not target.exists()
    assert before == (dict(vars(np)), {key: value._call for key, value in pickles._STAND_INS.items()})
    assert len(load_object_array(pickle.dumps(pair(LENS, 1.0)))) == 2  # the stand-ins still stand


def test_the_payloads_are_live(tmp_path):
    owned = set()
    for which in NAMES:
        target = tmp_path / which
        content = hostile(f"mkdir '{target}'", target)[which]
        if which.startswith(("reduce", "protocol", "bare", "nested", "in a list", "inst", "obj", "a name within")):
            with contextlib.suppress(Exception):
                pickle.loads(content)
            owned |= {which} if target.exists() else set()
    assert {"reduce 0", "reduce 1", "reduce 2", "protocol 0", "nested", "in a list", "inst", "obj", "bare"} <= owned


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_pickle_is_an_error_or_an_array(data):
    content = bytearray(pickle.dumps(pair(LENS, np.float64(1)), data.draw(st.integers(2, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        for item in load_object_array(bytes(content)):
            assert isinstance(item, np.ndarray | float)
            assert not isinstance(item, np.ndarray) or item.dtype.kind in "fiu"


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (pair(LENS, LENS), "2 arrays and 0 numbers"),
        (pair(1.0, 2.0), "0 arrays and 2 numbers"),
        (pair(np.array([LENS, 1], dtype=object), 2.0), "it holds objects"),
        (pair(LENS.astype(complex), 2.0), "numbers of type 'c16'"),
    ],
)
def test_other_objects_than_an_image_and_its_mass(tmp_path, stored, said):
    np.save(tmp_path / "a.npy", stored)
    with pytest.raises(UserError, match=said):
        prepare(tmp_path / "a.npy", tmp_path / "out")
