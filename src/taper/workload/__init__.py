"""Seeded load: when requests arrive, and what they ask for. Everything follows from (seed, index)."""

from taper.workload.arrivals import arrival_times
from taper.workload.mix import Mix, Planned, RequestSpec, schedule
from taper.workload.regime import Regime, contended

__all__ = ["Mix", "Planned", "Regime", "RequestSpec", "arrival_times", "contended", "schedule"]
