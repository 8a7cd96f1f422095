"""Oracles: zennit-crp (cut) and masks hooked into zennit's float64 gradient (keep); dense matrices in numpy for both."""

from __future__ import annotations

import pytest
from tests.support.cases import COMPOSITES, EXPORTERS, TOLERANCE

EVERY_COMPOSITE = ("resnet18", "squeezenet1_1")  # elsewhere the default alone, to keep the run short


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("bypass", ["cut", "keep"])
@pytest.mark.parametrize("composite", COMPOSITES)
def test_conditional_relevance_equals_zennit(parity, composite, bypass, exporter, record_property):
    from tests.support.parity import errors

    if composite != COMPOSITES[0] and parity.name not in EVERY_COMPOSITE:
        pytest.skip("one composite per net is enough")
    reference = parity.conditional(composite, bypass)
    record = parity.layers if bypass == "keep" else ()  # zennit-crp records after the mask
    result = parity.explainer(exporter, composite).explain(
        parity.x[:1], parity.targets[0], conditions=parity.conditions, bypass=bypass, record=record
    )
    worst = {name: float(errors(result.relevance[name][0], R, 1).max()) for name, R in reference.items()}
    for name, error in worst.items():
        record_property(name, f"{error:.1e}")
    assert max(worst.values()) < TOLERANCE, worst
