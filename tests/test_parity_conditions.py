"""Oracles: zennit-crp (cut) and masks hooked into zennit's float64 gradient (keep)."""

from __future__ import annotations

import pytest

from tests.support.cases import COMPOSITES, EXPORTERS, TOLERANCE


def check(parity, composite, bypass, exporter):
    from tests.support.parity import errors

    reference = parity.conditional(composite, bypass)
    record = parity.layers if bypass == "keep" else ()  # zennit-crp records after the mask
    result = parity.explainer(exporter, composite).explain(
        parity.x[:1], parity.targets[0], conditions=parity.conditions, bypass=bypass, record=record
    )
    worst = {name: float(errors(result.relevance[name][0], R, 1).max()) for name, R in reference.items()}
    print(f"PARITY {parity.name} {composite} {exporter} {bypass} {worst}")  # pytest -rP shows it
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("bypass", ["cut", "keep"])
def test_conditions_on_two_layers(parity, bypass, exporter):
    check(parity, COMPOSITES[0], bypass, exporter)


@pytest.mark.parametrize("parity", ["squeezenet1_1", "resnet18"], indirect=True, scope="session")
@pytest.mark.parametrize("bypass", ["cut", "keep"])
@pytest.mark.parametrize("composite", COMPOSITES[1:])
def test_conditions_under_other_composites(parity, composite, bypass):
    check(parity, composite, bypass, EXPORTERS[0])
