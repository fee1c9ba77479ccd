"""Reads a pickle of tensors and plain values without running anything that it names, within a budget.

Python's unpickler calls what a pickle tells it to call. Torch's restricted one calls a short list, but a file of a few
kilobytes can still fill the memory or hang whoever visits the result: `bytearray(10**12)`, lists that hold each other
forty levels deep, a tensor of 10**12 elements over one number. This reader knows the operations that `torch.save`
writes, builds every value itself, and counts.

| in the pickle                                  | becomes                                                             |
|------------------------------------------------|---------------------------------------------------------------------|
| None, bool, int, float, complex, str, bytes    | itself; an int of 255 bytes at most                                 |
| list, tuple, dict, set, OrderedDict, Counter   | itself; keys are plain values; an OrderedDict keeps its `_metadata` |
| bytearray, bytes by `_codecs.encode`           | itself, from bytes or text that is in the file                      |
| torch.Size, torch.dtype, torch.device          | itself                                                              |
| tensor, parameter                              | a plain tensor on the CPU, no larger than its storage               |
| anything else (sparse, quantised, NumPy, ...)  | `Foreign`: its name; never imported, never called                   |
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import torch
from torch import Tensor

MOST_BYTES = 1 << 28
"""Of a pickle; the numbers of tensors lie beside it."""
MOST_OPERATIONS = 5_000_000
"""Of a pickle: an empty list takes one byte there and sixty in memory."""
DEEPEST = 60
"""Levels of nesting."""
_FREE = 500_000
"""Values, or characters, that a small file may hold when what is shared is counted each time."""
_SHARED = 4
"""How many times its operations, or bytes, a larger pickle may hold."""
_VIEWS = 16
"""How many times its size the tensors of a file may have together: shared weights are saved under each name."""


class UnsafeError(Exception):
    """What a pickle holds cannot be read, or would cost more than its size allows."""


class HarmfulError(UnsafeError):
    """A pickle that names a function to run; the message is that name."""


class Foreign:
    """In place of a class, a function or an object that is neither a tensor nor a plain value: nothing but its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Storage:
    """The memory of tensors, as a pickle names it."""

    def __init__(self, memory: torch.UntypedStorage, dtype: torch.dtype) -> None:
        self.memory, self.dtype = memory, dtype


OpenStorage = Callable[[str, int], torch.UntypedStorage]
"""(key, bytes) -> the memory of that name. Raises `UnsafeError` where the file has no such bytes."""

_STORAGES = {
    "ByteStorage": torch.uint8, "CharStorage": torch.int8, "ShortStorage": torch.int16, "IntStorage": torch.int32,
    "LongStorage": torch.int64, "BoolStorage": torch.bool, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
_HARMFUL = {"os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "pty", "runpy", "importlib", "ctypes", "code"}
_HARMFUL_BUILTINS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint", "print"}
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "torch.tensor": "torch._tensor"}
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))
_MARK = object()


def load(file: IO[bytes], open_storage: OpenStorage, file_size: int) -> Any:
    """The value of one pickle, from where the file stands. Raises `UnsafeError`."""
    reader = _Reader(file, open_storage, file_size)
    try:
        value = reader.load()
    except UnsafeError:
        raise
    except Exception as error:  # whatever a damaged pickle provokes: a missing memo, a stack too short, no UTF-8
        raise UnsafeError(f"a damaged pickle ({type(error).__name__}: {str(error).splitlines()[0:1]})") from None
    _check_cost(value, max(_FREE, _SHARED * reader.operations), max(_FREE, _SHARED * reader.size))
    return value


def find_foreign(value: Any, path: str = "") -> Iterator[str]:
    """Where a value that `load` returned holds `Foreign` objects, with their classes: `meta.log: numpy.ndarray`."""
    if isinstance(value, Foreign):
        yield f"{path or 'the file'}: {value.name}"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from find_foreign(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for number, item in enumerate(value):
            yield from find_foreign(item, f"{path}.{number}")


def _check_cost(value: Any, most_values: int, most_text: int) -> None:
    """See that a value can be visited and printed: what is shared counts each time it is met."""
    known: dict[int, tuple[int, int, int]] = {}
    open_now: set[int] = set()

    def cost(item: Any, level: int) -> tuple[int, int, int]:
        """Values, characters and levels of an item."""
        if isinstance(item, (str, bytes, bytearray)):
            return 1, len(item), 0
        if not isinstance(item, (dict, list, tuple, set, frozenset)):
            return 1, 0, 0
        if id(item) in known:
            return known[id(item)]
        if level > DEEPEST or id(item) in open_now:
            raise UnsafeError("its values are nested too deep, or hold themselves")
        open_now.add(id(item))
        values, text, levels = 1, 0, 0
        for child in (*item.keys(), *item.values()) if isinstance(item, dict) else item:
            more, longer, deeper = cost(child, level + 1)
            values, text, levels = values + more, text + longer, max(levels, deeper + 1)
        if values > most_values or text > most_text:
            raise UnsafeError("its values refer to each other so often that to visit them would take for ever")
        open_now.discard(id(item))
        known[id(item)] = values, text, levels
        return known[id(item)]

    if cost(value, 0)[2] > DEEPEST:
        raise UnsafeError("its values are nested too deep")


class _Reader:
    """A stack machine for the operations of protocols 2 to 5 that hold data."""

    def __init__(self, file: IO[bytes], open_storage: OpenStorage, file_size: int) -> None:
        self._file, self._open_storage = file, open_storage
        self._file_size = file_size
        self.size = self.operations = self._made = self._viewed = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        while (code := self._read(1)[0]) != _STOP:
            self.operations += 1
            if self.operations > MOST_OPERATIONS:
                raise UnsafeError(f"it has more than {MOST_OPERATIONS:,} values beside the tensors")
            action = _ACTIONS.get(code)
            if action is None:
                raise UnsafeError(f"it has an operation that torch does not write ({bytes([code])!r})")
            action(self)
        return self.top(1)[0]

    def _read(self, count: int) -> bytes:
        self.size += count
        if self.size > MOST_BYTES:
            raise UnsafeError(f"its values beside the tensors have more than {MOST_BYTES >> 20} MB")
        data = self._file.read(count)
        if len(data) != count:
            raise UnsafeError("it ends too early")
        return data

    def _line(self) -> str:
        line = self._file.readline(1000)
        self.size += len(line)
        if not line.endswith(b"\n"):
            raise UnsafeError("it ends too early")
        return line[:-1].decode()

    def number(self, form: str) -> Any:
        return struct.unpack(form, self._read(struct.calcsize(form)))[0]

    def bytes_of(self, form: str) -> bytes:
        return self._read(self.number(form))

    def text(self, form: str) -> None:
        self.push(self.bytes_of(form).decode("utf-8", "surrogatepass"))

    def old_text(self, form: str) -> None:
        """Python 2's `str`."""
        self.push(self.bytes_of(form).decode("utf-8", "backslashreplace"))

    def long(self, form: str) -> None:
        count = self.number(form)
        if not 0 <= count <= 255:
            raise UnsafeError("it holds an integer of more than 255 bytes")
        self.push(int.from_bytes(self._read(count), "little", signed=True))

    def buffer(self, form: str) -> None:
        self.push(bytearray(self.bytes_of(form)))

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._stack.append(_MARK)

    def above_mark(self) -> list[Any]:
        """What was pushed since the last mark, taken off."""
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                items = self._stack[place + 1 :]
                del self._stack[place:]
                return items
        raise UnsafeError("it closes what it never opened")

    def top(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise UnsafeError("it takes more than it holds")
        items = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        if any(item is _MARK for item in items):
            raise UnsafeError("it opens what it never closes")
        return items

    def tuple_of(self, count: int) -> None:
        self.push(tuple(self.top(count)))

    def put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def get(self, place: int) -> None:
        self.push(self._memo[place])

    def memoize(self) -> None:
        self.put(len(self._memo))

    def append(self, items: list[Any]) -> None:
        holder = self._stack[-1]
        if type(holder) is list:
            holder.extend(items)
        elif not isinstance(holder, Foreign):
            raise UnsafeError("it appends to what is not a list")

    def set_items(self, items: list[Any]) -> None:
        holder = self._stack[-1]
        if isinstance(holder, Foreign):
            return
        if type(holder) not in (dict, OrderedDict, Counter) or len(items) % 2:
            raise UnsafeError("it sets items of what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            holder[_plain_key(key)] = value

    def add_items(self, items: list[Any]) -> None:
        holder = self._stack[-1]
        if type(holder) is set:
            holder.update(map(_plain_key, items))
        elif not isinstance(holder, Foreign):
            raise UnsafeError("it adds to what is not a set")

    def name(self, module: str, name: str) -> None:
        module = _OLD_NAMES.get(module, module)
        if module.split(".")[0] in _HARMFUL or (module == "builtins" and name in _HARMFUL_BUILTINS):
            raise HarmfulError(f"{module}.{name}")
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        self.push(dtype if isinstance(dtype, torch.dtype) else Foreign(f"{module}.{name}"))

    def named_on_stack(self) -> None:
        module, name = self.top(2)
        self.name(str(module), str(name))

    def call(self) -> None:
        arguments = self.top(1)[0]
        function = self.top(1)[0]
        if not isinstance(arguments, tuple) or not isinstance(function, Foreign):
            raise UnsafeError("it calls what is not a function, or without arguments")
        action = _CALLS.get(function.name)
        self.push(Foreign(function.name) if action is None else action(self, *arguments))

    def call_with_names(self) -> None:
        self.top(1)
        self.call()

    def build(self) -> None:
        """Set an object's state: only torch's `_metadata` of a state dict is kept."""
        state = self.top(1)[0]
        holder = self._stack[-1]
        if isinstance(holder, OrderedDict) and isinstance(state, dict) and set(state) == {"_metadata"}:
            holder._metadata = state["_metadata"]  # type: ignore[attr-defined]
        elif not isinstance(holder, (Foreign, OrderedDict)):
            raise UnsafeError("it changes an object that torch.save does not change")

    def storage(self) -> None:
        pid = self.top(1)[0]
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise UnsafeError("it refers to something outside that is not the memory of a tensor")
        _, kind, key, _, count, *view = pid
        name = kind.name.rsplit(".", 1)[-1] if isinstance(kind, Foreign) else ""
        dtype = _STORAGES.get(name)
        if dtype is None:
            self.push(Foreign(name))
        elif not _is_count(count) or any(part is not None for part in view):
            raise UnsafeError("it has memory of no size, or a view of some")
        else:
            self.push(Storage(self._open_storage(str(key), count * dtype.itemsize), dtype))

    def tensor(self, storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor | Foreign:
        """Rebuild a tensor that lies within its storage."""
        if not isinstance(storage, Storage) or any(rest[2:]):
            return Foreign("torch.Tensor")
        return self._view(storage, storage.dtype, offset, size, stride)

    def tensor_with_dtype(
        self, storage: Any, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
    ) -> Tensor | Foreign:
        if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype) or any(rest):
            return Foreign("torch.Tensor")
        return self._view(storage, dtype, offset, size, stride)

    def _view(self, storage: Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > DEEPEST or not all(map(_is_count, numbers)):
            raise UnsafeError("it has a tensor without a valid shape")
        count, last = 1, offset
        for side, step in zip(size, stride, strict=True):
            count *= side
            last += (side - 1) * step
        held = storage.memory.nbytes() // dtype.itemsize
        if count > held or (count and last >= held):
            raise UnsafeError(f"it has a tensor of {count} values over memory of {held}")
        self._viewed += count * dtype.itemsize
        if self._viewed > max(_FREE, _VIEWS * self._file_size):
            raise UnsafeError("its tensors share memory so often that copies of them would fill any memory")
        return torch.empty(0, dtype=dtype).set_(storage.memory, offset, tuple(size), tuple(stride))

    def encode(self, text: str, how: str) -> bytes:
        if how not in ("latin1", "latin-1"):
            raise UnsafeError("it encodes text in a way that pickle does not")
        return self._counted(text.encode("latin1"))

    def bytearray_of(self, data: Any = b"", how: str = "latin1") -> bytearray:
        if isinstance(data, str):
            data = self.encode(data, how)
        if not isinstance(data, (bytes, bytearray)):
            raise UnsafeError("it asks for a bytearray of a given size")
        return bytearray(self._counted(bytes(data)))

    def collection(self, kind: type, items: Any = ()) -> Any:
        """A dict, a set or a list of values that are in the file."""
        self.count(len(items))
        if kind in (OrderedDict, Counter):
            made: Any = kind()
            for key, value in items.items() if isinstance(items, dict) else items:
                made[_plain_key(key)] = value
        else:
            made = kind(map(_plain_key, items))
        return made

    def _counted(self, data: bytes) -> bytes:
        self.count(len(data))
        return data

    def count(self, count: int) -> None:
        """What is made of values already read, and so is not bounded by the bytes of the pickle."""
        self._made += count
        if self._made > max(_FREE, _SHARED * self.size):
            raise UnsafeError("it makes much more than it holds")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _plain_key(key: Any) -> Any:
    """A key whose hash costs nothing: a tuple of tuples of tuples can take for ever."""
    if isinstance(key, _PLAIN_KEYS) or (isinstance(key, tuple) and all(isinstance(item, _PLAIN_KEYS) for item in key)):
        return key
    if isinstance(key, (torch.dtype, torch.device, Foreign)):
        return key
    raise UnsafeError("it has a key that is not a plain value")


def _size(reader: _Reader, items: Any = ()) -> Any:
    reader.count(len(items))
    return torch.Size(items) if all(map(_is_count, items)) else Foreign("torch.Size")


def _device(_reader: _Reader, *where: Any) -> Any:
    return torch.device(*where) if all(isinstance(part, (str, int)) for part in where) else Foreign("torch.device")


def _complex(_reader: _Reader, *parts: Any) -> complex:
    return complex(*(float(part) for part in parts))


def _parameter(_reader: _Reader, data: Any = None, *_rest: Any) -> Any:
    return data if isinstance(data, Tensor) else Foreign("torch.nn.Parameter")


_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda reader, items=(): reader.collection(OrderedDict, items),
    "collections.Counter": lambda reader, items=(): reader.collection(Counter, items),
    "builtins.set": lambda reader, items=(): reader.collection(set, items),
    "builtins.frozenset": lambda reader, items=(): reader.collection(frozenset, items),
    "builtins.bytearray": _Reader.bytearray_of,
    "builtins.bytes": lambda reader, *data: bytes(reader.bytearray_of(*data)),
    "builtins.complex": _complex,
    "_codecs.encode": _Reader.encode,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _Reader.tensor,
    "torch._utils._rebuild_tensor_v2": _Reader.tensor,
    "torch._utils._rebuild_tensor_v3": _Reader.tensor_with_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
}


_STOP = ord(".")
_ACTIONS: Mapping[int, Callable[[_Reader], Any]] = {
    0x80: lambda r: r.number("<B"),  # PROTO
    0x95: lambda r: r.number("<Q"),  # FRAME: read through, frame or not
    ord("("): _Reader.mark,
    ord("N"): lambda r: r.push(None),
    0x88: lambda r: r.push(True),
    0x89: lambda r: r.push(False),
    ord("K"): lambda r: r.push(r.number("<B")),
    ord("M"): lambda r: r.push(r.number("<H")),
    ord("J"): lambda r: r.push(r.number("<i")),
    0x8A: lambda r: r.long("<B"),
    0x8B: lambda r: r.long("<i"),
    ord("G"): lambda r: r.push(r.number(">d")),
    ord("X"): lambda r: r.text("<I"),
    0x8C: lambda r: r.text("<B"),
    0x8D: lambda r: r.text("<Q"),
    ord("U"): lambda r: r.old_text("<B"),
    ord("T"): lambda r: r.old_text("<I"),
    ord("B"): lambda r: r.push(r.bytes_of("<I")),
    ord("C"): lambda r: r.push(r.bytes_of("<B")),
    0x8E: lambda r: r.push(r.bytes_of("<Q")),
    0x96: lambda r: r.buffer("<Q"),
    ord("]"): lambda r: r.push([]),
    ord("}"): lambda r: r.push({}),
    ord(")"): lambda r: r.push(()),
    0x8F: lambda r: r.push(set()),
    ord("t"): lambda r: r.push(tuple(r.above_mark())),
    0x85: lambda r: r.tuple_of(1),
    0x86: lambda r: r.tuple_of(2),
    0x87: lambda r: r.tuple_of(3),
    ord("a"): lambda r: r.append(r.top(1)),
    ord("e"): lambda r: r.append(r.above_mark()),
    ord("s"): lambda r: r.set_items(r.top(2)),
    ord("u"): lambda r: r.set_items(r.above_mark()),
    0x90: lambda r: r.add_items(r.above_mark()),
    0x91: lambda r: r.push(r.collection(frozenset, r.above_mark())),
    ord("q"): lambda r: r.put(r.number("<B")),
    ord("r"): lambda r: r.put(r.number("<I")),
    0x94: _Reader.memoize,
    ord("h"): lambda r: r.get(r.number("<B")),
    ord("j"): lambda r: r.get(r.number("<I")),
    ord("c"): lambda r: r.name(r._line(), r._line()),
    0x93: _Reader.named_on_stack,
    ord("R"): _Reader.call,
    0x81: _Reader.call,  # NEWOBJ: `cls.__new__(cls, *arguments)`
    0x92: _Reader.call_with_names,
    ord("b"): _Reader.build,
    ord("Q"): _Reader.storage,
}
