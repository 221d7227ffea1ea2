"""The protocols that come with TAPER, by name."""

from __future__ import annotations

from collections.abc import Mapping

from taper.forkjoin.protocol import FrontEndFactory
from taper.forkjoin.protocols.hpd import Hpd
from taper.forkjoin.protocols.outline import multiverse, threadweaver
from taper.forkjoin.protocols.scripted import scripted
from taper.forkjoin.protocols.skeleton import Skeleton
from taper.forkjoin.protocols.sprint import Sprint

BUILT_IN: Mapping[str, FrontEndFactory] = {
    "multiverse": multiverse,
    "threadweaver": threadweaver,
    "sprint": Sprint.from_options,
    "skeleton-of-thought": Skeleton.from_options,
    "hpd": Hpd.from_options,
    "scripted": scripted,
}
