"""Products by another library are the same products, and give way where a gradient is asked for."""

import pytest
import torch

from models import products
from models.products import affine, squared_norms


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_an_affine_map_is_its_definition(forced, strided, monkeypatch):
    if forced:
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            pytest.skip("this torch has no oneDNN")
        monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    x, weight, bias = torch.randn(900, 70), torch.randn(60, 70), torch.randn(60)
    x, weight = (x.T.contiguous().T, weight.T.contiguous().T) if strided else (x, weight)
    expected = x @ weight.T + bias
    for dtype, close in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        with torch.no_grad():
            found = affine(x.to(dtype), weight.to(dtype), bias.to(dtype))
        assert found.dtype == dtype
        assert torch.allclose(found.double(), expected, atol=close)
    weight = weight.float().requires_grad_()
    affine(x.float(), weight).sum().backward()
    assert torch.allclose(weight.grad[0].double(), x.sum(0), atol=1e-3)


def test_squared_norms_with_and_without_gradients():
    x = torch.randn(5, 4, 3)
    x[0, 0] = 0.0
    with torch.no_grad():
        assert torch.allclose(squared_norms(x), (x**2).sum(2))
        assert squared_norms(x)[0, 0] == 0
    x.requires_grad_()
    squared_norms(x).sum().backward()
    assert torch.allclose(x.grad, 2 * x.detach())
