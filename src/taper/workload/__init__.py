"""Seeded load: when requests arrive, and what they ask for. Everything follows from (seed, index)."""

from taper.workload.arrivals import Arrivals
from taper.workload.branching import Branching, parse_branching, profile, profile_names
from taper.workload.demand import Demand
from taper.workload.lengths import Lengths, Quantiles, Weighted
from taper.workload.mix import Mix, parse_mix
from taper.workload.regime import Regime, contended
from taper.workload.request import Request, Stage
from taper.workload.source import Replay, Source, Synthetic
from taper.workload.traces import TraceError, TraceRow, read_trace

__all__ = [
    "Arrivals",
    "Branching",
    "Demand",
    "Lengths",
    "Mix",
    "Quantiles",
    "Regime",
    "Replay",
    "Request",
    "Source",
    "Stage",
    "Synthetic",
    "TraceError",
    "TraceRow",
    "Weighted",
    "contended",
    "parse_branching",
    "parse_mix",
    "profile",
    "profile_names",
    "read_trace",
]
