"""Oracle: zennit in float64, on torchvision's nets and an ECG net, exported by both of torch's exporters."""

from __future__ import annotations

import pytest

from tests.support.cases import COMPOSITES, EXPORTERS, TOLERANCE


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("composite", COMPOSITES)
def test_relevance_equals_zennit(parity, composite, exporter):
    from tests.support.parity import errors

    reference = parity.reference(composite)
    questions = [{"y": target} for target in parity.targets]
    result = parity.explainer(exporter, composite).explain(parity.x, conditions=questions, record=parity.layers)
    assert errors(result.explained, parity.logits, 1).max() < TOLERANCE
    worst = {name: float(errors(result.relevance[name], R, 2).max()) for name, R in reference.items()}
    print(f"PARITY {parity.name} {composite} {exporter} {worst}")  # pytest -rP shows it
    assert max(worst.values()) < TOLERANCE, worst
