"""Registries: the one list of the names of a kind, such as methods or codecs.

The names are known without making the values, so that a command's help shows them without PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Generic, TypeVar

from options.messages import unknown

T = TypeVar("T")


class Registry(MutableMapping[str, T], Generic[T]):
    """Values by name, in the order of their entry.

    Args:
        option: the Python name of the option that chooses an entry, such as ``"method"``.
        error: the exception for a name that is not there.
    """

    def __init__(self, option: str, error: type[Exception] = ValueError):
        self.option, self._error = option, error
        self._entries: dict[str, Callable[[], T]] = {}
        self._values: dict[str, T] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """Enter the function or class below under this name."""

        def enter(value: T) -> T:
            self[name] = value
            return value

        return enter

    def defer(self, name: str) -> Callable[[Callable[[], T]], Callable[[], T]]:
        """Enter what the function below returns; it is called once, when the entry is first used."""

        def enter(make: Callable[[], T]) -> Callable[[], T]:
            self._entries[name] = make
            self._values.pop(name, None)
            return make

        return enter

    def find(self, name: str) -> T:
        """Return the entry of a name, or raise an error that lists all names and says which is nearest."""
        self.check(name)
        return self[name]

    def maker(self, name: str) -> Callable[[], T]:
        """Return the function that makes an entry; that of a deferred entry has the entry's documentation."""
        return self._entries[name]

    def check(self, name: object) -> None:
        """Raise the registry's error unless there is an entry of this name."""
        if name not in self._entries:
            raise self._error(unknown(self.option, name, self._entries))

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            self._values[name] = self._entries[name]()
        return self._values[name]

    def __setitem__(self, name: str, value: T) -> None:
        self._entries[name] = lambda: value
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]
        self._values.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries
