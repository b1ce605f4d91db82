"""Read a pickle as data: an interpreter of the pickle format that can neither import nor call.

The standard library lists the opcodes of a pickle (``pickletools.genops``); `unpickle` carries them
out. The opcodes that name a class or function push a `Name`, which is text. The opcodes that call
one hand it to `rebuild`, which builds plain containers and tensors and keeps the rest as a
`StandIn`. So a file that holds a whole ``nn.Module``, of a class that is not installed here, is
read to its end.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from reptrt.sources.rebuild import Name, StandIn, rebuild

_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocol 2 spells them
_MARK = object()

PersistentLoad = Callable[[tuple[Any, ...]], Any]  # persistent id -> Storage or Name


class PickleError(Exception):
    """A pickle that is damaged, or uses an opcode that torch never writes."""


def unpickle(stream: BinaryIO, persistent_load: PersistentLoad) -> Any:
    """Return what one pickle describes; the stream then stands behind the pickle's last byte.

    Damaged bytes can raise exceptions of other kinds too (ValueError, IndexError, ...).

    Args:
        stream: standing at the start of a pickle.
        persistent_load: called with every persistent id, a tuple.

    Raises:
        UnsafePickleError: the pickle calls something that reaches the system.
        PickleError: an opcode does not fit the values on the stack.
    """
    machine = _Machine(persistent_load)
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in _LITERALS:
            machine.stack.append(argument)
        elif opcode.name in _ACTIONS:
            _ACTIONS[opcode.name](machine, argument)
        elif opcode.name not in _WITHOUT_EFFECT:
            raise PickleError(f"{opcode.name} is an opcode that torch never writes")
    return machine.pop()


class _Machine:
    """The stack and the memo of a pickle that is being read; one method per kind of opcode."""

    def __init__(self, persistent_load: PersistentLoad) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.persistent_load = persistent_load

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("a mark stands where a value was expected")
        return value

    def pop_to_mark(self) -> list[Any]:
        """Return the values above the last mark, and remove them and the mark."""
        index = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        values = self.stack[index + 1 :]
        del self.stack[index:]
        return values

    def push_tuple(self, length: int) -> None:
        values = [self.pop() for _ in range(length)]
        self.stack.append(tuple(reversed(values)))

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def push_name(self, module: Any, attribute: Any) -> None:
        if not (isinstance(module, str) and isinstance(attribute, str)):
            raise PickleError("a name is not text")
        self.stack.append(Name(f"{_PYTHON_2.get(module, module)}.{attribute}"))

    def push_stack_name(self) -> None:
        attribute, module = self.pop(), self.pop()
        self.push_name(module, attribute)

    def push_call(self, callee: Any, args: Any) -> None:
        if not isinstance(args, tuple):
            raise PickleError("the arguments of a call are not a tuple")
        self.stack.append(rebuild(callee, args))

    def call(self) -> None:
        args, callee = self.pop(), self.pop()
        self.push_call(callee, args)

    def call_with_keywords(self) -> None:
        keywords, args, callee = self.pop(), self.pop(), self.pop()
        self.push_call(callee, (*args, keywords))

    def call_named(self, names: str) -> None:
        args = self.pop_to_mark()
        self.push_name(*names.split(" ", 1))
        self.push_call(self.pop(), tuple(args))

    def call_marked(self) -> None:
        callee, *args = self.pop_to_mark()
        self.push_call(callee, tuple(args))

    def set_state(self) -> None:
        """Give a stand-in its state; a subclass's attributes on plain values are dropped."""
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, StandIn):
            target.state = _without_slots(state)

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list | StandIn):
            raise PickleError(f"items are added to a {type(target).__name__}")
        (target.items if isinstance(target, StandIn) else target).extend(values)

    def update(self, values: list[Any]) -> None:
        """Set the entries key, value, key, value, ... of the dict on the stack."""
        target = self.stack[-1]
        if not isinstance(target, dict | StandIn):
            raise PickleError(f"entries are set in a {type(target).__name__}")
        entries = target.entries if isinstance(target, StandIn) else target
        entries.update(zip(values[::2], values[1::2], strict=True))

    def push_dict(self) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self.update(values)

    def push_persistent(self) -> None:
        identity = self.pop()
        if not isinstance(identity, tuple):
            raise PickleError("a persistent id is not a tuple")
        self.stack.append(self.persistent_load(identity))


def _without_slots(state: Any) -> Any:
    """Return a state that pickle split into (attributes, slots) as one dict."""
    match state:
        case (dict() | None as attributes, dict() as slots):
            return {**(attributes or {}), **slots}
    return state


_WITHOUT_EFFECT = ("PROTO", "FRAME", "STOP")
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
}
_ACTIONS: Mapping[str, Callable[[_Machine, Any], Any]] = {
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_SET": lambda machine, _: machine.stack.append([]),  # sets become lists, see rebuild
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.memoize),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"),
        lambda machine, index: machine.stack.append(machine.memo[index]),
    ),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "FROZENSET": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "DICT": lambda machine, _: machine.push_dict(),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.update([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.pop_to_mark()),
    "GLOBAL": lambda machine, names: machine.push_name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.push_stack_name(),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "NEWOBJ_EX": lambda machine, _: machine.call_with_keywords(),
    "INST": _Machine.call_named,
    "OBJ": lambda machine, _: machine.call_marked(),
    "BUILD": lambda machine, _: machine.set_state(),
    "BINPERSID": lambda machine, _: machine.push_persistent(),
}
