"""The models of the coverage table: seeded random weights, the smallest member of a family, small inputs.

Every case says how it is built and which exporters write it; nothing is downloaded.
"""

from __future__ import annotations

from benchmarks.zoo import hugging, keras_, own, scikit, vision
from benchmarks.zoo.case import Case
from benchmarks.zoo.export import export

__all__ = ["Case", "cases", "export"]


def cases() -> list[Case]:
    """All of them, in the order of the table."""
    return [*vision.rows(), *hugging.rows(), *own.rows(), *keras_.rows(), *scikit.rows()]
