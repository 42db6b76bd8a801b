"""Fields of a dataclass that follow from others unless they are given."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")

#: Stands for a field that the constructor was not given at all: None is given, to have it derived.
LEFT_OUT: Any = object()


class Derived(Generic[Value]):
    """The default of such a field: reading computes the value, storing keeps what was given.

    ``dataclasses.replace`` hands on what it reads, and a value handed on would look as if it were given. So
    the class also has a field ``given`` (:func:`settle` makes it), which carries what was given to the copy,
    and :func:`hide` takes the derived fields off the list that ``replace`` goes by. They stay parameters of
    the constructor, and take part in comparisons by their values.

    Args:
        rule: The value, from the object that has the others.
    """

    def __init__(self, rule: Callable[[Any], Value]) -> None:
        self.rule = rule

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, holder: None, owner: type) -> Any: ...

    @overload
    def __get__(self, holder: object, owner: type) -> Value: ...

    def __get__(self, holder: object | None, owner: type) -> Any:
        if holder is None:
            return LEFT_OUT  # what a dataclass takes for the parameter's default
        given = holder.__dict__[self._name]
        return self.rule(holder) if given is None else given

    def __set__(self, holder: object, value: Value | None) -> None:
        holder.__dict__[self._name] = value


def rules(owner: type) -> dict[str, Callable[[Any], Any]]:
    """Derived fields of a class by name, and how they are derived."""
    return {name: value.rule for name, value in vars(owner).items() if isinstance(value, Derived)}


def settle(holder: Any) -> None:
    """In ``__post_init__``: values that were left out are those that the replaced object was given."""
    stored = holder.__dict__
    for name in rules(type(holder)):
        if stored[name] is LEFT_OUT:
            stored[name] = holder.given.get(name)
    stored["given"] = {name: stored[name] for name in rules(type(holder))}


def hide(owner: type) -> tuple[str, ...]:
    """Take a dataclass's derived fields off its list of fields. Returns the names of all but ``given``."""
    names = tuple(field.name for field in dataclasses.fields(owner) if field.name != "given")
    for name in rules(owner):
        del owner.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return names
