"""Products through oneDNN are products."""

import pytest
import torch

from inference import products
from inference.annealing import AnnealedELBO
from inference.backends import retraced
from inference.compiled import CompiledSVI
from inference.engine import SVI
from tests.inference.engines import batches, losses, parameters, vae_svi

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@needs_onednn
@pytest.mark.parametrize("left", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("right", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("inner", [30, 300])  # in the long ones factors that lie the other way round change places
def test_any_layout(left, right, inner, monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "MIN_FLOP", 0)

    def laid_out(rows, columns, layout):
        if layout == "transposed":
            return torch.randn(columns, rows, dtype=torch.float32).t()
        return torch.randn(rows, 2 * columns, dtype=torch.float32)[:, :: 2 if layout == "strided" else 1][:, :columns]

    a, b, c = laid_out(40, inner, left), laid_out(inner, 20, right), torch.randn(20, dtype=torch.float32)
    graph = retraced(lambda a, b, c: (torch.mm(a, b), torch.addmm(c, a, b)), (a, b, c))
    assert products.use_faster_products(graph) == 2
    exact = a.double() @ b.double()
    for found, expected in zip(graph(a, b, c), (exact, exact + c.double()), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        assert (found.double() - expected.flip(0)).abs().max() > 1


@needs_onednn
def test_scaled_and_double_products_are_left(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "MIN_FLOP", 0)
    a, b = torch.randn(4, 4, dtype=torch.float32), torch.randn(4, 4, dtype=torch.float32)
    scaled = retraced(lambda a, b: (torch.addmm(b, a, b, alpha=2.0, beta=0.5),), (a, b))
    assert products.use_faster_products(scaled) == 0
    assert products.use_faster_products(retraced(lambda a, b: (a @ b,), (a.double(), b.double()))) == 0
    monkeypatch.setattr(products, "MIN_FLOP", 1000)
    assert products.use_faster_products(retraced(lambda a, b: (a @ b,), (a, b))) == 0


@needs_onednn
def test_training_agrees_in_its_parameters(monkeypatch):
    """The loss alone is too coarse in float32 to tell one product from another."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "MIN_FLOP", 0)
    replaced = []
    original = products.use_faster_products
    monkeypatch.setattr("inference.backends.use_faster_products", lambda graph: replaced.append(original(graph)))
    engines = [vae_svi(kind, AnnealedELBO(), rate=0.01) for kind in (SVI, CompiledSVI)]
    before = parameters(engines[0])
    found = [losses(engine, batches(6)) for engine in engines]
    assert engines[1].why_eager is None
    assert replaced[0] > 5
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(parameters(engines[1]), parameters(engines[0]), rtol=1e-4, atol=1e-5)
    assert (parameters(engines[1]) - before).abs().max() > 1e-2
