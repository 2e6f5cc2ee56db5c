"""In: a pickle. Out: the arrays, numbers, text and plain containers in it; nothing of it is imported or run.

NumPy's own functions for loading pickles trust what they are given: a forged dtype makes them read memory at will. So
arrays are put together here, from a dtype of plain numbers and as many bytes as it needs.
"""

import io
import pathlib
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def _set(items: Iterable[Any] = ()) -> set:
    return {_checked_key(item) for item in items}


def _frozenset(items: Iterable[Any] = ()) -> frozenset:
    return frozenset(_set(items))


def _ordered(pairs: Iterable[Any] = ()) -> dict:
    return {_checked_key(name): value for name, value in pairs}


def _checked_key(key: Any) -> Any:
    """The key, if it is soon hashed; see `_check_parts`."""
    parts, held = 0, [key]
    while held:
        part, parts = held.pop(), parts + 1
        if parts > _MOST_PARTS:
            raise _Forged(f"a key of more than {_MOST_PARTS} parts")
        held += part if isinstance(part, (tuple, frozenset)) else ()
    return key


# What pickles of arrays and containers name, in numpy 1 and 2 and as Python 2 wrote it, and what stands for it here.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _StandIn(_encode),
    ("collections", "OrderedDict"): _StandIn(_ordered),
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
        (_builtins, "set"): _StandIn(_set),
        (_builtins, "frozenset"): _StandIn(_frozenset),
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


_MOST_PARTS = 64  # of a key of a dict, or of what a set holds
# By the name of an operation what it takes from the stack: so many things, after all down to a mark; and leaves there.
_EFFECTS = {
    code.name: (
        [*code.stack_before, pickletools.markobject].index(pickletools.markobject),
        pickletools.markobject in code.stack_before,
        [None if kind is pickletools.markobject else 1 for kind in code.stack_after],
    )
    for code in pickletools.opcodes
}
_OPERATIONS = {code.code.encode("latin1"): code for code in pickletools.opcodes}
_TUPLES = ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "FROZENSET")


def _check_parts(content: bytes) -> None:
    """Raises `_Forged` where a thing is remembered at a place for which memory would be taken without end, or a key is
    hashed for which time would be, or which is too deep: a tuple that holds another twice, which holds another twice,
    takes as much time as if none were shared.

    The stack of the unpickler is followed; of each thing on it is known of how many parts its hash is made.
    """
    stack: list[int | None] = []  # None is a mark
    memo: dict[Any, int | None] = {}
    for name, place in _operations(content):
        if name in ("PUT", "LONG_BINPUT") and place > len(content):
            raise _Forged(f"place {place} of {len(content)} bytes")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else place] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(place, 1))
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            count, marked, left = _EFFECTS[name]
            parts = []
            while marked and (part := stack.pop()) is not None:
                parts.append(part)
            parts = parts[::-1] + [stack.pop() for _ in range(count)]
            if any(part is not None and part > _MOST_PARTS for part in _hashed(name, parts)):
                raise _Forged(f"a key of more than {_MOST_PARTS} parts")
            stack += [min(1 + sum(filter(None, parts)), _MOST_PARTS + 1)] if name in _TUPLES else left


def _operations(content: bytes) -> Iterator[tuple[str, Any]]:
    """The operations of a pickle and what they are given; not text of Python 2, which may be in any encoding."""
    file = io.BytesIO(content)
    while code := file.read(1):
        operation = _OPERATIONS.get(code)
        if operation is None:
            raise _Forged(f"an operation {code!r}")
        given: Any = None
        if operation.name == "STRING":
            file.readline()
        elif operation.arg is not None:
            given = operation.arg.reader(file)
        yield operation.name, given
        if operation.name == "STOP":
            return
    raise _Forged("no end")


def _hashed(name: str, parts: Sequence[int | None]) -> Sequence[int | None]:
    """Of what an operation takes, those that are hashed."""
    if name in ("ADDITEMS", "FROZENSET"):
        return parts
    if name in ("SETITEMS", "DICT"):
        return parts[::2]
    return parts[1:2] if name == "SETITEM" else ()  # behind the value, which lies above it


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
