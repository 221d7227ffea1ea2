"""Python client of TAPER's fork and join, on top of `openai`: see `Taper` and `AsyncTaper`."""

from taper.client.programs import AsyncTaper, Taper, by_protocol
from taper.client.types import (
    Branch,
    BranchDelta,
    BranchEnded,
    BranchJoined,
    BranchResult,
    BranchStarted,
    Continuation,
    Event,
    Fork,
    Join,
    Lead,
    Program,
    ProgramDone,
    ProgramFailed,
    ProgramStarted,
)

__all__ = [
    "AsyncTaper",
    "Branch",
    "BranchDelta",
    "BranchEnded",
    "BranchJoined",
    "BranchResult",
    "BranchStarted",
    "Continuation",
    "Event",
    "Fork",
    "Join",
    "Lead",
    "Program",
    "ProgramDone",
    "ProgramFailed",
    "ProgramStarted",
    "Taper",
    "by_protocol",
]
