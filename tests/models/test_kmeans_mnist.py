"""K-means on images of MNIST: Lloyd's iterations are scikit-learn's, and the 64 codes are a picture."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans

from inference.canvas import save
from inference.data_figures import image_components
from inference.datasets import mnist
from inference.em import EMSettings, fit
from models.kmeans import KMeans

CODES, IMAGES = 64, 2000


@pytest.mark.row("0.25")
def test_64_codes_of_mnist_are_scikit_learns_and_a_picture(data_root, tmp_path):
    images = mnist(str(data_root), binarization="none").splits["train"][:IMAGES]
    x = torch.as_tensor(images).reshape(IMAGES, 784).double() / 255
    model = KMeans((784,), CODES)
    model.initialize(x, torch.Generator().manual_seed(0))
    start = model.codebook.detach().clone()
    untrained = float(model.inertia(x))
    result = fit(model, x, EMSettings(restarts=0, tolerance=0))
    theirs = SklearnKMeans(CODES, init=start.numpy(), n_init=1, tol=0, max_iter=500, algorithm="lloyd").fit(x.numpy())
    assert result.converged
    assert untrained > 1.2 * theirs.inertia_
    assert float(model.inertia(x)) == pytest.approx(theirs.inertia_, rel=1e-9)
    assert np.allclose(model.codebook.detach(), theirs.cluster_centers_, atol=1e-9)
    assert np.array_equal(model.encode(x), theirs.labels_)
    assert 40 < float(model.perplexity(x)) <= CODES

    codes = model.codebook.detach().reshape(CODES, 1, 28, 28).numpy()
    shares = np.bincount(theirs.labels_, minlength=CODES) / IMAGES
    picture = image_components(codes, shares, (0.0, 1.0), high_is_ink=True)
    drawn = np.asarray(picture.sheet.axes[0].images[0].get_array())[..., 0].astype(float)
    zoom = len(drawn) // (8 * 28)
    tiles = drawn[::zoom, ::zoom].reshape(8, 28, 8, 28).swapaxes(1, 2).reshape(CODES, -1)  # (8 28, 8 28) -> (64, 784)
    matches = np.corrcoef(tiles, codes.reshape(CODES, -1))[:CODES, CODES:]
    assert np.all(np.diag(matches) < -0.99)  # ink is dark
    assert np.array_equal(matches.argmin(1), np.arange(CODES))
    save(picture.sheet, tmp_path / "codes.png")
    assert (tmp_path / "codes.png").read_bytes().startswith(b"\x89PNG")
    assert "All 64 components" in picture.caption
