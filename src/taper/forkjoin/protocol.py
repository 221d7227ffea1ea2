"""What a protocol is: how an answer opens, and a parser that finds forks and ends in a branch's own output.

A protocol is a factory `(options) -> FrontEnd`. Installed packages add theirs under the entry point group
`taper.protocols`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Protocol

from taper.core.types import ConfigError
from taper.forkjoin.plan import BranchSpec, Event, Message

ENTRY_POINTS = "taper.protocols"


class Parser(Protocol):
    """Follows one branch over its life, from text in pieces. Never raises, whatever the text.

    malformed: tags so far that did not fit the grammar and were left as text.
    """

    malformed: int

    def feed(self, text: str) -> list[Event]:
        """More of the branch's own text."""

    def close(self) -> list[Event]:
        """A run of the branch is over; it may go on later, after a join."""


class FrontEnd(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def keeps_special_tokens(self) -> bool:
        """Whether the grammar is made of special tokens, which must then show in the text."""

    def opening(self, messages: Sequence[Message]) -> BranchSpec:
        """The root of the answer to `messages`."""

    def parser(self, spec: BranchSpec, *, is_root: bool) -> Parser: ...


Options = Mapping[str, Any]
FrontEndFactory = Callable[[Options], FrontEnd]


def resolve_protocol(name: str, options: Options, built_in: Mapping[str, FrontEndFactory]) -> FrontEnd:
    """Raises `ConfigError` for an unknown protocol, or options it does not take."""
    if name == "off":
        raise ConfigError("taper.protocol 'off' goes alone: no other field of taper means anything with it")
    factory = built_in.get(name)
    if factory is None:
        plugins = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        if name not in plugins:
            known = ", ".join([*built_in, *sorted(plugins), "off"])
            raise ConfigError(f"taper.protocol must be one of {known}, not {name!r}")
        factory = plugins[name].load()
    return factory(options)


def no_options(name: str, options: Options) -> None:
    if options:
        raise ConfigError(f"taper.options: protocol {name!r} takes none, not {', '.join(sorted(options))}")
