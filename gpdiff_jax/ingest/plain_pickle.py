"""In: a pickle. Out: the arrays, numbers, text and plain containers in it; nothing of it is imported or run.

NumPy's own functions for loading pickles trust what they are given: a forged dtype makes them read memory at will. So
arrays are put together here, from a dtype of plain numbers and as many bytes as it needs.
"""

import io
import pathlib
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from gpdiff_jax.errors import InputError
from gpdiff_jax.files import DAMAGE

_PLAIN_DTYPE = re.compile(r"[fiub]\d{1,2}")


class _Forged(ValueError):
    """A pickle that says of an array what no array is like."""


class _Dtype:
    """What a pickle says of a dtype; only plain numbers are believed."""

    def __init__(self, code: Any, *flags: Any) -> None:
        del flags
        if not isinstance(code, str) or _PLAIN_DTYPE.fullmatch(code) is None:
            raise _Forged(f"dtype {code[:20]!r}" if isinstance(code, str) else f"dtype of type {type(code).__name__}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order, *structure = state[1:5]
        if order not in ("<", ">", "|", "=") or structure != [None, None, None]:
            raise _Forged("dtype with parts")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """What a pickle says of an array, which comes in two parts."""

    def __init__(self) -> None:
        self.array = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _array(content, dtype, shape, "F" if fortran else "C")


class _StandIn:
    """A function that a pickle may call, and may not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *words: Any) -> Any:
        return self._function(*words)

    def __setstate__(self, state: Any) -> None:
        raise _Forged("a change of a function")


def _array(content: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise _Forged("an array without a dtype")
    raw = content.encode("latin1") if isinstance(content, str) else bytes(memoryview(content))
    sizes = tuple(int(size) for size in shape)
    if min(sizes, default=0) < 0 or int(np.prod(sizes, dtype=object)) * dtype.dtype.itemsize != len(raw):
        raise _Forged(f"an array of shape {sizes} in {len(raw)} bytes")
    return np.frombuffer(raw, dtype.dtype).reshape(sizes, order="F" if order == "F" else "C")


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any, *more: Any) -> np.ndarray:
    del more
    return _array(content, dtype, shape, order)


def _scalar(dtype: Any, content: Any) -> Any:
    return _array(content, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise _Forged("bytes in another encoding")
    return text.encode("latin1")


def _reconstruct(*ignored: Any) -> _Array:
    del ignored
    return _Array()


def _no_bytes() -> bytes:
    return b""


# What pickles of arrays and containers name, in numpy 1 and 2 and as Python 2 wrote it, and what stands for it here.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _StandIn(_encode),
    ("collections", "OrderedDict"): dict,
    ("numpy", "dtype"): _StandIn(_Dtype),
    ("numpy", "ndarray"): "ndarray",
}
for _core in ("numpy._core", "numpy.core"):
    _STAND_INS |= {
        (f"{_core}.multiarray", "_reconstruct"): _StandIn(_reconstruct),
        (f"{_core}.multiarray", "scalar"): _StandIn(_scalar),
        (f"{_core}.numeric", "_frombuffer"): _StandIn(_frombuffer),
    }
for _builtins in ("builtins", "__builtin__"):
    _STAND_INS |= {
        (_builtins, "bytes"): _StandIn(_no_bytes),
        (_builtins, "set"): set,
        (_builtins, "frozenset"): frozenset,
    }


def load_plain_pickle(path: pathlib.Path) -> Any:
    """Loads a pickle of arrays of numbers, numbers, text and plain containers, and of nothing else.

    Args:
      path: the file.

    Returns:
      What it holds, in lists, tuples, dicts and sets.

    Raises:
      InputError: it is damaged, or names anything else, which loading it would import or run.
    """

    class Plain(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str) -> Any:
            if (module_name, global_name) not in _STAND_INS:
                raise InputError(
                    f"{path} names {module_name}.{global_name}, and loading it could run code; save the matrix as .npy"
                )
            return _STAND_INS[module_name, global_name]

        def persistent_load(self, pid: Any) -> Any:
            raise _Forged(f"a reference to a {type(pid).__name__}")

    try:
        # Files of Python 2 hold text in its old form.
        content = path.read_bytes()
        _check_parts(content)
        return _finished(Plain(io.BytesIO(content), encoding="latin1").load(), {})
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from None
    except (*DAMAGE, pickle.UnpicklingError, AttributeError, MemoryError) as error:
        raise InputError(
            f"{path} is a damaged pickle ({type(error).__name__}: {str(error)[:80]}); take another"
        ) from None


_MOST_PARTS = 10**6
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _check_parts(content: bytes) -> None:
    """Raises `_Forged` where a thing is remembered at a place for which memory, or a tuple hashed for which time, would
    be taken without end: a tuple of which each part holds another twice takes as much as if none were shared.

    The stack of the unpickler is followed, of each thing on it the parts of which its hash is made.
    """
    stack: list[int | None] = []  # None is a mark
    memo: dict[Any, int | None] = {}
    most = max(_MOST_PARTS, len(content))
    for code, place, _ in pickletools.genops(content):
        if code.name in ("PUT", "LONG_BINPUT") and place is not None and place > len(content):
            raise _Forged(f"place {place} of {len(content)} bytes")
        if code.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[place] = stack[-1]
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(place, 1))
        elif code.name == "DUP":
            stack.append(stack[-1])
        else:
            taken = _taken(code, stack)
            if code.name == "TUPLE" or code.name in _TUPLES:
                parts = 1 + sum(part or 0 for part in taken)
                if parts > most:
                    raise _Forged(f"a tuple of more than {most} parts in {len(content)} bytes")
                stack.append(parts)
            else:
                stack += [None if kind is pickletools.markobject else 1 for kind in code.stack_after]


def _taken(code: pickletools.OpcodeInfo, stack: list[int | None]) -> list[int | None]:
    """Takes from the stack what an operation takes."""
    taken: list[int | None] = []
    single = len(code.stack_before)
    if pickletools.markobject in code.stack_before:
        while (part := stack.pop()) is not None:
            taken.append(part)
        single = code.stack_before.index(pickletools.markobject)
    for _ in range(single):
        taken.append(stack.pop())
    return taken


def _finished(held: Any, made: dict[int, Any]) -> Any:
    """The same with arrays in place of what was said of them; what is there a thousand times is made once."""
    if id(held) in made:
        return made[id(held)]
    if isinstance(held, _Array):
        return held.array
    if isinstance(held, (list, tuple)):
        made[id(held)] = type(held)(_finished(value, made) for value in held)
    elif isinstance(held, dict):
        made[id(held)] = {name: _finished(value, made) for name, value in held.items()}
    return made.get(id(held), held)
