import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.evaluate import evaluating
from inference.export import import_arviz, write_posterior
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import MLP
from models.priors import StandardNormal


@pytest.mark.row("5.9")
def test_the_file_opens_in_arviz_with_the_log_likelihoods_of_its_own_draws(tmp_path):
    def small(i, o):
        return MLP(i, o, hidden=(5,))

    model = LatentVariableModel(StandardNormal((3,)), Bernoulli((1, 2, 4), (3,), small))
    guide = Amortized(DiagonalNormal((3,), (1, 2, 4), small))
    x = (torch.rand(6, 1, 2, 4) < 0.4).double()
    with evaluating(model, guide, seed=0):
        write_posterior(tmp_path / "posterior.nc", model, guide, x, draws=40)
    data = import_arviz().from_netcdf(str(tmp_path / "posterior.nc"))
    assert {"posterior", "posterior_predictive", "observed_data", "log_likelihood"} <= set(data.groups())
    z = torch.as_tensor(data.posterior["z"].values)
    assert z.shape == (1, 40, 6, 3)
    assert np.array_equal(data.observed_data["x"].values, x.numpy())
    with torch.no_grad():
        logits = model.likelihood.net(z[0]).numpy()  # (40, 6, 1, 2, 4)
    by_hand = np.where(x.numpy() == 1, -np.logaddexp(0, -logits), -np.logaddexp(0, logits)).sum((-3, -2, -1))
    assert np.allclose(data.log_likelihood["x"].values[0], by_hand, atol=1e-10)
    predicted = data.posterior_predictive["x"].values[0]
    assert predicted.shape == (40, 6, 1, 2, 4)
    probability = 1 / (1 + np.exp(-logits))
    error = np.sqrt((probability * (1 - probability)).sum()) / predicted.size
    assert abs(predicted.mean() - probability.mean()) < 5 * error
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_the_first_import_of_a_day_warns_of_nothing(tmp_path):
    """ArviZ keeps in a cache when it last gave its notice; a cache that is empty is a new user's."""
    run = partial(subprocess.run, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True)
    bare = run([sys.executable, "-W", "error::FutureWarning", "-c", "import arviz"])
    if "FutureWarning" not in bare.stderr:
        pytest.skip("this ArviZ has no daily notice")
    ours = run([sys.executable, "-W", "error", "-c", "from inference.export import import_arviz; import_arviz()"])
    assert ours.returncode == 0, ours.stderr
