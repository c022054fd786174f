"""Read an agent's parameters; all that are wrong are told at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mesh import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Settings:
    """
    The parameters of one agent, read one by one; `check` raises for all that were wrong.

    Args:
        params: The agent's `params`.
    """

    def __init__(self, params: Mapping[str, str]) -> None:
        """Begin without complaints."""
        self._params = params
        self._problems: list[str] = []

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Read a number between two bounds."""
        text = self._params.get(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            self._problems.append(f"param {name}={text}: must be a number from {low:g} to {high:g}")
            return default
        return value

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """Read a whole number between two bounds."""
        value = self.number(name, default, low, high)
        if value != int(value):
            self._problems.append(f"param {name}={self._params[name]}: must be a whole number")
            return default
        return int(value)

    def complain(self, problem: str) -> None:
        """Add a mistake found elsewhere."""
        self._problems.append(problem)

    def check(self) -> None:
        """
        Raise when something was wrong.

        Raises:
            ConfigurationError: Names every mistake.
        """
        if self._problems:
            raise ConfigurationError(self._problems)
