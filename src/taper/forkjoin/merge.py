"""One ordered answer from branches that speak at once: children's text goes where their parent forked."""

from __future__ import annotations

from dataclasses import dataclass, field

from taper.forkjoin.events import Ended, ProgramEvent, Started, Text


@dataclass(slots=True, eq=False)
class _Node:
    parent: _Node | None
    pieces: list[str | _Node] = field(default_factory=list)  # in the order of the answer
    next_piece: int = 0
    is_over: bool = False


class OutlineOrder:
    """Holds text back until all that comes before it in the answer has been handed out."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}
        self._at: _Node | None = None  # where the answer has got to

    def feed(self, event: ProgramEvent) -> str:
        """The answer's text that this event makes available; often none."""
        if isinstance(event, Started):
            parent = self._nodes[event.parent] if event.parent else None
            node = self._nodes[event.branch] = _Node(parent)
            if parent is None:
                self._at = node
            else:
                parent.pieces.append(node)
        elif isinstance(event, Text):
            if event.is_visible and event.text:
                self._nodes[event.branch].pieces.append(event.text)
        elif isinstance(event, Ended):
            self._nodes[event.branch].is_over = True
        return self._advance()

    def _advance(self) -> str:
        ready: list[str] = []
        node = self._at
        while node is not None:
            if node.next_piece < len(node.pieces):
                piece = node.pieces[node.next_piece]
                node.next_piece += 1
                if isinstance(piece, str):
                    ready.append(piece)
                else:
                    node = piece
            elif node.is_over and node.parent is not None:
                node = node.parent
            else:
                break
        self._at = node
        return "".join(ready)
