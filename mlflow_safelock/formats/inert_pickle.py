"""Pickles, read as documents and never run.

A pickle is a program for a small stack machine; some of its instructions import names and call them, which
is how opening one can run anything. The machine here does neither: a *global* becomes a ``Global``, which
holds two strings, and a *call* becomes a ``Call``, which holds a ``Global`` and its arguments. What they mean
is for the caller to decide, by looking at them. ``pickle`` itself is not used, so there is no second reader
that could see another program in the same bytes; ``pickletools`` splits the bytes into instructions and does
no more.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlflow_safelock.errors import LockFormatError

PROTOCOL = 2
"""The pickle protocol that ``torch.save`` writes."""


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to; nothing is imported.

    Attributes:
        module: The module it names.
        name: The name in that module.
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """A call that a pickle asks for; nothing is called.

    Attributes:
        function: What it asks to call.
        arguments: With which arguments.
        state: What it asks to set on the result (``__setstate__``); ``None`` where it asks for nothing.
    """

    function: Global
    arguments: tuple[Any, ...]
    state: tuple[Any, ...] | None = None


class _Mark:
    """Where a group of values begins on the stack."""


_MARK = _Mark()
_Instruction = tuple[str, Any, int]


def read_inert(data: bytes, *, allowed: frozenset[Global], origin: str) -> object:
    """What a pickle describes, made of plain values, ``Global`` and ``Call``.

    Args:
        data: The pickle, all of it.
        allowed: The globals that it may name.
        origin: Names the file in errors.

    Returns:
        Dicts, lists, tuples, text, numbers, booleans, ``None``, ``Global`` and ``Call`` objects.

    Raises:
        LockFormatError: It names another global, uses an instruction that such a file has no need of, is of
            another protocol, or is damaged.
    """
    refused = sorted({str(name) for name in _globals(data, origin) if name not in allowed})
    if refused:
        raise LockFormatError(
            f"{origin} is a pickle that names {', '.join(refused[:5])[:300]}, which no published lock needs: "
            "opening it with pickle or torch could run code. Nothing was run.",
            next_step="Do not open this file; fetch the lock again from its authors.",
        )
    return _Machine(origin).run(_instructions(data, origin), len(data))


def _instructions(data: bytes, origin: str) -> Iterator[_Instruction]:
    try:
        for opcode, argument, position in pickletools.genops(data):
            yield opcode.name, argument, position or 0
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        raise LockFormatError(f"The pickle in {origin} is damaged: {str(error)[:200]}.") from error


def _globals(data: bytes, origin: str) -> Iterator[Global]:
    """Every global that the pickle names.

    For protocols that put the name on the stack, which are refused in any case, the last two texts are taken.
    """
    texts = ["", ""]
    for opcode, argument, _ in _instructions(data, origin):
        if opcode in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            yield Global(module, name)
        elif opcode == "STACK_GLOBAL":
            yield Global(*texts)
        elif isinstance(argument, str):
            texts = [texts[1], argument]


@dataclass
class _Machine:
    """The stack, the memo, and one method for each instruction that changes them."""

    origin: str
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, instructions: Iterator[_Instruction], length: int) -> object:
        position = -1
        for index, (opcode, argument, position) in enumerate(instructions):
            if (index == 0) != (opcode == "PROTO"):
                raise self._fault(
                    f"opcode {opcode} at byte {position}: PROTO must come first, and only there"
                )
            step = _STEPS.get(opcode)
            if step is None:
                raise self._fault(f"opcode {opcode} at byte {position} is not one that a published lock has")
            step(self, argument)
        # The instructions end with STOP, or pickletools would have refused them.
        if position + 1 != length:
            raise self._fault(f"{length - position - 1} bytes follow its end")
        return self._only_value()

    def protocol(self, argument: int) -> None:
        if argument != PROTOCOL:
            raise self._fault(f"protocol {argument} is not {PROTOCOL}, which published locks are written in")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def push_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Global(module, name))

    def remember(self, slot: int) -> None:
        if slot in self.memo:
            raise self._fault(f"memo slot {slot} is written twice")
        self.memo[slot] = self._top(object)

    def recall(self, slot: int) -> None:
        if slot not in self.memo:
            raise self._fault(f"memo slot {slot} is read before it is written")
        self.stack.append(self.memo[slot])

    def tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def tuple_from_mark(self) -> None:
        self.stack.append(tuple(self._since_mark()))

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def extend(self) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def set_item(self) -> None:
        value = self._pop()
        self._set(self._pop(), value)

    def set_items(self) -> None:
        values = self._since_mark()
        if len(values) % 2:
            raise self._fault("a dict with a key that has no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            self._set(key, value)

    def call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise self._fault("a call of something that is not a global")
        self.stack.append(Call(function, arguments))

    def build(self) -> None:
        state = self._pop()
        target = self._top(Call)
        if target.state is not None or not isinstance(state, tuple):
            raise self._fault(f"a state for {target.function} that is no tuple, or a second one")
        target.state = state

    def stop(self) -> None:
        self._only_value()

    def _set(self, key: object, value: object) -> None:
        values = self._top(dict)
        if not isinstance(key, str):
            raise self._fault("a dict key that is not text")
        if key in values:
            raise self._fault(f"the dict key {key[:80]!r} twice")
        values[key] = value

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise self._fault("an instruction that takes more values than there are")
        return self.stack.pop()

    def _top(self, kind: type[Any]) -> Any:
        if not self.stack or self.stack[-1] is _MARK or not isinstance(self.stack[-1], kind):
            raise self._fault(f"an instruction that needs a {kind.__name__}, and there is none")
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        values: list[Any] = []
        while self.stack and self.stack[-1] is not _MARK:
            values.append(self.stack.pop())
        if not self.stack:
            raise self._fault("an instruction that needs a mark, and there is none")
        self.stack.pop()
        values.reverse()
        return values

    def _only_value(self) -> object:
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise self._fault(f"{len(self.stack)} values at its end instead of one")
        return self.stack[0]

    def _fault(self, what: str) -> LockFormatError:
        return LockFormatError(f"The pickle in {self.origin} is refused: {what}.")


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "BININT": _Machine.push,
    "BININT1": _Machine.push,
    "BININT2": _Machine.push,
    "BINFLOAT": _Machine.push,
    "BINUNICODE": _Machine.push,
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "MARK": lambda machine, _: machine.push(_MARK),
    "TUPLE": lambda machine, _: machine.tuple_from_mark(),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append(),
    "APPENDS": lambda machine, _: machine.extend(),
    "SETITEM": lambda machine, _: machine.set_item(),
    "SETITEMS": lambda machine, _: machine.set_items(),
    "GLOBAL": _Machine.push_global,
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "STOP": lambda machine, _: machine.stop(),
}
"""The instructions that are followed: those of the published locks and their near kin, none of which acts."""
