"""Energy of the processor packages through RAPL, where the machine lets us read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class _Domain:
    counter: Path
    range_uj: int


@dataclass(frozen=True)
class EnergyMeter:
    """The energy counters of all processor packages. They count everything that runs, so time alone what you measure.

    Attributes:
        reason: Why nothing can be measured here; empty when it can.
    """

    domains: tuple[_Domain, ...]
    reason: str

    def read_uj(self) -> tuple[int, ...]:
        """The counters, in microjoules; empty when there are none."""
        return tuple(int(domain.counter.read_text()) for domain in self.domains)

    def joules_since(self, before: tuple[int, ...]) -> float | None:
        """Joules since `before` was read, or ``None`` where nothing can be measured. A counter may wrap once."""
        if not self.domains:
            return None
        spent = 0
        for domain, first, last in zip(self.domains, before, self.read_uj(), strict=True):
            spent += last - first if last >= first else last - first + domain.range_uj
        return spent / 1e6


def open_meter(root: Path = POWERCAP) -> EnergyMeter:
    """Find the package counters below `root` (``intel-rapl:<n>``; AMD's go by that name too) and try to read them."""
    folders = sorted(path for path in root.glob("intel-rapl:*") if path.name.count(":") == 1)
    if not folders:
        return EnergyMeter((), f"this machine shows no energy counters ({root}/intel-rapl:*)")
    domains = []
    for folder in folders:
        counter = folder / "energy_uj"
        try:
            int(counter.read_text())
            domains.append(_Domain(counter, int((folder / "max_energy_range_uj").read_text())))
        except (OSError, ValueError) as error:
            problem = error.strerror if isinstance(error, OSError) else str(error)
            return EnergyMeter((), f"the energy counter cannot be read: {counter}: {problem}")
    return EnergyMeter(tuple(domains), "")
