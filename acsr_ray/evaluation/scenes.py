"""One (data, target) of a finished sweep: the view that tables, checks and figures share."""

from dataclasses import dataclass

from acsr_ray.evaluation.grid import Grid, SweepDefense
from acsr_ray.evaluation.results import Cell, Results

NONE = "none"
"""Name of the defence that does nothing."""
ABSENT = "-"
"""What a table shows where a sweep had no cell."""


@dataclass(frozen=True)
class Scene:
    """One (data, target) of a sweep with its cells."""

    grid: Grid
    results: Results
    data: str
    target: str

    def cell(self, attack: str, defense: str, split: str = "test") -> Cell | None:
        """Return a cell of this data set and target."""
        return self.results.get(self.data, self.target, attack, defense, split)

    @property
    def title(self) -> str:
        """What the scene is called."""
        return f"{self.data}, {self.target}"

    @property
    def defenses(self) -> tuple[SweepDefense, ...]:
        """Defences that serve the data set."""
        return self.grid.defenses_of(self.data)
