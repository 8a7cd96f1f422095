"""What a canonizer tells about its work; a module of its own, so that passes need not import their package."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PassReport:
    """What one pass changed, and what it looked at and left alone with the reason; one line each."""

    name: str
    done: list[str] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
