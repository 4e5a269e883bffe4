"""Everything that is wrong with the data, gathered so that it can be said at once."""

import difflib
from collections import defaultdict
from collections.abc import Iterable

SHOWN = 20  # of each kind


class Problems:
    """Findings by kind. `raise_any` turns them into one ValueError, the first twenty of each kind."""

    def __init__(self):
        self.found: dict[str, list[str]] = defaultdict(list)
        self.facts: list[str] = []  # what else was found, said with the problems or without

    def add(self, kind: str, text: str):
        """One finding, naming the file or the key."""
        self.found[kind].append(text)

    def count(self) -> int:
        """How many there are."""
        return sum(len(entries) for entries in self.found.values())

    def raise_any(self):
        """ValueError listing all of them, if there are any."""
        lines = ["the data cannot be used as it is; nothing was started", *(f"  {fact}" for fact in self.facts)]
        for kind, found in self.found.items():
            entries = list(dict.fromkeys(found))  # a set that two others name was looked at twice
            more = [f"… and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
            lines += [f"  {len(entries)} {kind}:", *(f"    {entry}" for entry in entries[:SHOWN] + more)]
        if self.found:
            raise ValueError("\n".join(lines))


def near_miss(name: str, candidates: Iterable[str]) -> str:
    """A hint at what was perhaps meant: another case, or nearly the same letters."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""
