"""What a reader left out or changed, counted, so that one line can say it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Notes:
    """Counts by what happened, each with its first example."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, event: str, example: object = "", count: int = 1) -> None:
        """Count an `event`, which is a plural such as "empty classes"; the first example is kept."""
        if count:
            self.counts[event] = self.counts.get(event, 0) + count
            self.examples.setdefault(event, str(example))

    def __str__(self) -> str:
        """One line; empty where nothing happened."""
        shown = {event: f" (first: {example})" if example else "" for event, example in self.examples.items()}
        return "; ".join(f"{event}: {count:,}{shown[event]}" for event, count in self.counts.items())
