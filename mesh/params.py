"""An agent's parameters, which remember what they were asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


class Params(Mapping[str, str]):
    """
    Parameters by name; a misspelt one is found among those that nobody has read.

    Args:
        values: What was given.
    """

    def __init__(self, values: Mapping[str, str]) -> None:
        """Nothing is read yet."""
        self._values = dict(values)
        #: Names that somebody has asked for, given or not.
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> str:
        """Give one; that it was asked for is remembered."""
        self.read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._values)

    def __len__(self) -> int:
        """Tell how many were given."""
        return len(self._values)

    def __repr__(self) -> str:
        """Show them as a dict."""
        return repr(self._values)
