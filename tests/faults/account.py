"""An account of what was thrown and what became of it: each line must close to the piece."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Line:
    """One sum."""

    what: str
    total: int
    parts: dict[str, int]

    @property
    def closes(self) -> bool:
        return self.total == sum(self.parts.values())


@dataclass(slots=True)
class Account:
    """What a run came to."""

    lines: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    #: Figures that are shown and judged by nobody.
    notes: dict[str, object] = field(default_factory=dict)
    #: What is said at the end when there are no problems.
    all_well: str = "nobody stopped, all is counted"

    def close(self, what: str, total: int, **parts: int) -> None:
        """Add a line; one that does not close is a problem."""
        line = Line(what, total, {name: amount for name, amount in parts.items() if amount})
        self.lines.append(line)
        if not line.closes:
            self.problems.append(f"{what}: {total} is not {sum(parts.values())}, {parts}")

    def table(self) -> str:
        """Give the account for people."""
        rows: list[tuple[str, str]] = []
        for line in self.lines:
            rows.append((line.what, f"{line.total:,}{'' if line.closes else '  DOES NOT CLOSE'}"))
            rows += [(f"    {name.replace('_', ' ')}", f"{n:,}") for name, n in line.parts.items()]
        rows += [(name, str(value)) for name, value in self.notes.items()]
        width = max(len(name) for name, _ in rows)
        text = "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
        verdict = "\n".join(self.problems) or self.all_well
        return f"{text}\n{verdict}\n"
