"""The exception tree."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from mlflow_safelock import errors
from mlflow_safelock.errors import BrokenLedgerError, PromotionRefused, SafelockError

ALL = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]


def drawn_tree() -> dict[str, str]:
    """Every class of the drawing at the top of the module, with the class it hangs from."""
    parents: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        match = re.match(r"^ {4}([ │├└─]*)([A-Z]\w+)", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        above = [*above[:depth], match[2]]
        parents[match[2]] = above[depth - 1] if depth else "Exception"
    return parents


def test_the_drawn_tree_is_the_real_one():
    assert drawn_tree() == {kind.__name__: kind.__mro__[1].__name__ for kind in ALL}


def test_every_error_is_caught_as_the_base():
    assert len(ALL) > 15
    assert all(issubclass(kind, SafelockError) for kind in ALL)


@pytest.mark.parametrize("kind", ALL)
def test_every_error_goes_to_another_process_as_it_is(kind):
    first = {PromotionRefused: ("no_lock",), BrokenLedgerError: (7,)}.get(kind, ())
    error = kind(*first, "It is wrong.", next_step="Do it right.")
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is kind
        assert (str(twin), vars(twin)) == (str(error), vars(error))


def test_every_error_says_what_it_is_for():
    assert all(kind.__doc__ and kind.__doc__.strip().endswith(".") for kind in ALL)


@pytest.mark.parametrize(
    ("next_step", "shown"),
    [("", "The file is empty."), ("Fetch it again.", "The file is empty. Fetch it again.")],
)
def test_message_is_the_cause_and_then_the_next_step(next_step, shown):
    error = SafelockError("The file is empty.", next_step=next_step)
    assert (error.cause, error.next_step, str(error)) == ("The file is empty.", next_step, shown)


def test_refusal_carries_a_reason_that_machines_read():
    error = PromotionRefused("missing_lock", "No lock for this base.", next_step="Register one.")
    assert error.reason == "missing_lock"
    assert str(error) == "No lock for this base. Register one."
