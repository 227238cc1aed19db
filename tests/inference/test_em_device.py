"""EM on a device that this machine need not have: tensors that know their device and hold no numbers.

Such a tensor refuses to meet one of another device, so that whatever is left on the host is found; and the values that
the host asks for, each a wait for the device, can be counted.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from inference.em import EMSettings, e_step, fit
from models.gmm import GaussianMixture
from models.hmm import HMM
from models.kmeans import KMeans
from models.latent_class import LatentClassModel
from models.ppca import PPCA
from models.tabular import TabularVAE

MODELS = {
    **{f"gmm, {kind}": lambda kind=kind: GaussianMixture((4,), 3, kind, ridge=0.1)
       for kind in ("full", "tied", "diagonal", "spherical")},
    "gmm of many dimensions": lambda: GaussianMixture((130,), 3),
    "kmeans": lambda: KMeans((2, 2), 3),
    "ppca": lambda: PPCA((4,), 2),
    "hmm": lambda: HMM((5,), 3),
    "hmm of symbols": lambda: HMM((5,), 3, "categorical", 4),
    "latent class": lambda: LatentClassModel((4,), 3),
    "tabular": lambda: TabularVAE((4,), 3),
}  # fmt: skip


class Reads:
    """Answers in the place of numbers that are not there, counted: yes, and one."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name, answer in (("__bool__", True), ("__float__", 1.0), ("__int__", 1), ("item", 1.0)):
            monkeypatch.setattr(torch.Tensor, name, self._answering(answer))
        monkeypatch.setattr(
            torch.Tensor, "nonzero", lambda tensor: tensor.new_empty((0, tensor.dim()), dtype=torch.long)
        )
        monkeypatch.setattr(torch.Tensor, "tolist", self._answering([]))

    def _answering(self, answer):
        def read(tensor):
            self.count += 1
            return answer

        return read


class NoGenerator:
    """In the place of a generator, which would ask for a device that is there."""

    def __init__(self, device):
        assert device.type == "cuda"

    def manual_seed(self, seed):
        return None


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch, "Generator", NoGenerator)
    with FakeTensorMode():
        yield Reads(monkeypatch)


def placed(make):
    with torch.device("cuda:0"):
        model = make()
        return model, torch.zeros(20, *getattr(model, "event_shape", (4,)))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_an_e_step_stays_on_the_device_and_asks_nothing(make, device):
    model, x = placed(make)
    before = device.count
    for hard in (False, True):
        statistics, log_evidence = e_step(model, x, hard, chunk=7)
        assert device.count == before
        with torch.no_grad():
            bound = model.expected_log_joint(statistics)
        assert {value.device.type for value in (*statistics.values(), log_evidence, bound)} == {"cuda"}
        assert {value.dtype for value in (*statistics.values(), log_evidence, bound)} == {torch.float64}


@pytest.mark.parametrize("variant", ["exact", "incremental"])  # gradients ask for a device that is there
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_whole_fit_stays_on_the_device(make, variant, device):
    model, x = placed(make)
    fit(model, x, EMSettings(variant=variant, iterations=2, restarts=2, blocks=2))
    assert {value.device.type for value in model.state_dict().values()} == {"cuda"}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_an_iteration_waits_a_few_times_whatever_the_data(make, device):
    model, x = placed(make)
    fit(model, x, EMSettings(iterations=1, restarts=0, chunk=1))
    assert device.count <= 8


def test_a_tensor_left_on_the_host_is_found(device):
    model, x = placed(MODELS["gmm, full"])
    model.shift = model.shift.cpu()
    with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        e_step(model, x)
