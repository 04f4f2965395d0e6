"""Which stages of the table a command is about: --from, --until, --only, --force."""

from __future__ import annotations

from dataclasses import dataclass

from medtrain import stages
from medtrain.errors import ConfigError
from medtrain.stage import Stage
from medtrain.stages import STAGES


@dataclass(frozen=True, slots=True)
class Selection:
    """Which stages of the table a command is about."""

    start: str | None = None
    until: str | None = None
    only: str | None = None
    force: tuple[str, ...] = ()

    def stages(self) -> list[Stage]:
        """The chosen stages in order.

        Raises:
            ConfigError: a name is no stage, or the choice is empty.
        """
        names = [stage.name for stage in STAGES]
        for name in (self.start, self.until, self.only, *self.force):
            if name is not None and name not in names:
                raise ConfigError(f"There is no stage {name!r}", fix=f"Stages: {', '.join(names)}")
        if self.only:
            if self.start or self.until:
                raise ConfigError("--only goes with neither --from nor --until")
            if others := [name for name in self.force if name != self.only]:
                raise ConfigError(f"--force {others[0]} is outside --only {self.only}")
            return [stages.by_name(self.only)]
        first = names.index(self.start) if self.start else 0
        last = names.index(self.until) if self.until else len(names) - 1
        if first > last:
            raise ConfigError(f"--from {self.start} comes after --until {self.until}")
        outside = [name for name in self.force if not first <= names.index(name) <= last]
        if outside:
            raise ConfigError(f"--force {outside[0]} is outside --from and --until")
        return list(STAGES[first : last + 1])
