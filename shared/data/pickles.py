"""Object arrays of .npy files, as DeepLense's `axion` class is stored, read without running their pickle.

A pickle is a program. This one is run only after each of its instructions was found among those with which numpy
writes an array, and where it names one of numpy's functions it is handed a stand-in of this file: no function of
numpy or of any other package is ever called by a pickle, and no attribute of anything is set by one.
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

# What numpy's arrays are pickled with, protocols 2 to 5: no INST, OBJ, NEWOBJ, EXT, PERSID, dictionary or set.
_INSTRUCTIONS = re.compile(
    """PROTO | FRAME | STOP | MARK | POP | POP_MARK | MEMOIZE | (LONG_)?BIN(PUT|GET) | PUT | GET | (STACK_)?GLOBAL |
    REDUCE | BUILD | NONE | NEWTRUE | NEWFALSE | INT | BININT[12]? | LONG1? | (BIN)?FLOAT | EMPTY_LIST | APPENDS? |
    EMPTY_TUPLE | TUPLE[123]? | (SHORT_)?BINBYTES | BINBYTES8 | BYTEARRAY8 | (SHORT_)?BINUNICODE""",
    re.VERBOSE,
)
_LARGEST_MEMO = 10_000  # an array needs some 40 places; the place number decides how much memory Python sets aside


def load_object_array(content: bytes) -> list[np.ndarray | float]:
    """The items of a one-dimensional object array, each an array of real numbers or a number.

    content  what follows the header of an .npy file of dtype object

    Raises ValueError for anything else; whatever it holds, nothing is run but the stand-ins below.
    """
    try:
        for instruction, argument, _ in pickletools.genops(content):
            if not _INSTRUCTIONS.fullmatch(instruction.name):
                raise ValueError(f"the instruction {instruction.name}")
            if "PUT" in instruction.name and int(str(argument)) > _LARGEST_MEMO:
                raise ValueError("absurd memory")
        loaded = _Unpickler(content).load()
        if not isinstance(loaded, _Array) or loaded.items is None or len(loaded.shape) != 1:
            raise ValueError("no list of objects")
        return [_number(item) for item in loaded.items]
    except _Refused as error:
        raise ValueError(f"is a pickle that asks for {error}: it may run code, and is not loaded") from error
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"is a pickle of something else than arrays and numbers ({reason})") from error


class _Refused(Exception):
    pass


class _StandIn:
    """Plays one of numpy's names: can be called, and nothing else."""

    __slots__ = ("_call",)
    _call: Callable[..., Any] | None

    def __init__(self, call: Callable[..., Any] | None = None):
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        if self._call is None:
            raise _Refused("a call of a type")
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Refused(f"a change of {name}")

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a change of a function")


class _Dtype:
    __slots__ = ("dtype",)

    def __init__(self, code: Any, align: Any = False, copy: Any = False):
        if not isinstance(code, str):  # and not shown: the repr of nested tuples may be of any size
            raise _Refused("numbers of a type without a name")
        if not re.fullmatch(r"[<>|=]?([fiu][1248]|O8?)", code):
            raise _Refused(f"numbers of type {code[:40]!r}")
        self.dtype = np.dtype(code.replace("O8", "O"))

    def __setstate__(self, state: tuple) -> None:
        _, order, *fields = state
        if order not in ("<", ">", "|", "=") or any(field is not None for field in fields[:3]):
            raise _Refused("a structured type")
        self.dtype = self.dtype.newbyteorder(order) if self.dtype != object else self.dtype


class _Array:
    """An array in the making: numpy's `_reconstruct` makes an empty one, and its state follows."""

    __slots__ = ("items", "shape", "values")

    def __init__(self) -> None:
        self.items: list | None = None
        self.values: np.ndarray | None = None
        self.shape: tuple[int, ...] = ()

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self._fill(shape, dtype, "F" if fortran else "C", data)

    def _fill(self, shape: Any, dtype: Any, order: Any, data: Any) -> None:
        if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple) or order not in ("C", "F"):
            raise ValueError("a malformed array")
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError("a malformed shape")
        self.shape = shape
        if dtype.dtype == object:
            if not isinstance(data, list) or len(data) != math.prod(shape):
                raise ValueError("an object array without its items")
            self.items = data
        else:
            if not isinstance(data, bytes | bytearray):
                raise ValueError("an array without its bytes")
            self.values = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _Refused("an array of another class")
    return _Array()


def _scalar(dtype: Any, data: Any) -> float:
    if not isinstance(dtype, _Dtype) or dtype.dtype == object or not isinstance(data, bytes):
        raise _Refused("a number that is none")
    return np.frombuffer(data, dtype.dtype, count=1)[0].item()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
    array = _Array()
    array._fill(shape, dtype, order, data)
    return array


def _encode(text: Any, codec: Any) -> bytes:
    if not isinstance(text, str) or codec != "latin1":
        raise _Refused("another codec")
    return text.encode("latin1")


_NDARRAY = _StandIn()
_STAND_INS = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _StandIn(_Dtype),
    ("_codecs", "encode"): _StandIn(_encode),  # how protocol 2 writes bytes
    # numpy.core until numpy 2, numpy._core since
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _StandIn(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _StandIn(_scalar) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _StandIn(_frombuffer) for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _Refused(f"{module}.{name}")
        return _STAND_INS[module, name]


def _number(item: Any) -> np.ndarray | float:
    if isinstance(item, _Array) and item.values is not None:
        return item.values if item.shape else float(item.values.item())
    if isinstance(item, int | float) and not isinstance(item, bool):
        return float(item)
    raise ValueError(f"it holds {'objects' if isinstance(item, _Array) else type(item).__name__}")
