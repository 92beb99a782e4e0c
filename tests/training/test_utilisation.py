"""MFU against the figures that PaLM's authors publish for their own run."""

import pytest

from implementations.training.utilisation import flops_per_token, utilisation


@pytest.mark.parametrize("layers, published", [(118, 0.462), (0, 0.457)])
def test_palms_published_utilisation(layers, published):
    """540.35 billion parameters, 118 layers, 48 heads of 256, 2,048 tokens; 238.3 thousand tokens/s
    on 6,144 TPU v4 of 275 TFLOP/s: 46.2 %, without attention 45.7 % (appendix B, table 3).
    """
    flops = flops_per_token(540_350_000_000, layers=layers, width=48 * 256, length=2048)
    assert utilisation(238.3e3, flops, 6144 * 275e12) == pytest.approx(published, abs=5e-4)
