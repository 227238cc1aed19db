"""Runs in one step, in a script that leaves Pyro's settings as they are."""

import pyro
import torch

from guides.amortized import Amortized
from guides.gaussian import DiagonalNormal
from inference.compiled import CompiledSVI
from inference.engine import SharedOptimizer
from inference.objectives import ELBO
from inference.vectorized import VectorizedSVI
from models.latent import LatentVariableModel
from models.likelihoods import Bernoulli
from models.nets import MLP
from models.priors import StandardNormal


def run(seed):
    torch.manual_seed(seed)
    net = lambda *shapes: MLP(*shapes, hidden=(8,))  # noqa: E731
    model = LatentVariableModel(StandardNormal((2,)), Bernoulli((6,), (2,), net))
    guide = Amortized(DiagonalNormal((2,), (6,), net))
    parameters = [*model.parameters(), *guide.parameters()]
    return CompiledSVI(model, guide, SharedOptimizer(parameters, torch.optim.Adam, 1e-2), ELBO())


def test_runs_step_together_without_a_setting_of_pyros():
    x = torch.randint(0, 2, (5, 6)).double()
    with pyro.settings.context(module_local_params=False):
        pyro.clear_param_store()
        together = VectorizedSVI([run(0), run(1)], [torch.Generator().manual_seed(s) for s in (0, 1)], inductor=False)
        losses = torch.stack([together.step([x, x]) for _ in range(4)])
        assert together.why_eager is None
        assert together._together is not None
        alone = VectorizedSVI([run(0), run(1)], [torch.Generator().manual_seed(s) for s in (0, 1)], inductor=False)
        alone.why_eager = "told so"
        torch.testing.assert_close(losses, torch.stack([alone.step([x, x]) for _ in range(4)]), rtol=1e-10, atol=0)
        assert not dict(pyro.get_param_store())
    assert losses[0, 0] != losses[0, 1]
