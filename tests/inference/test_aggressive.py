"""Aggressive training of the encoder against a loop written out, and its state across a resume."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from inference.aggressive import MOST, WINDOW, AggressiveSVI
from inference.assemble import assemble
from inference.config import ConfigError, load
from inference.data import Batches, Source
from inference.engine import SVI, SharedOptimizer
from inference.experiment import _trainer
from inference.objectives import ELBO
from inference.rows import real
from inference.trainer import Trainer, TrainerSettings

ROWS, BATCH, RATE = 24, 4, 0.05


class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 3)

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 0.5).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x):
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z", dist.Normal(self.net(x), 0.3).to_event(1))


def adam(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr)


def source():
    torch.manual_seed(1)
    rows = {split: (torch.randn(ROWS, 2) @ torch.randn(2, 3)).numpy() for split in ("train", "valid", "test")}
    return Source(real("toy", rows, "numbers"), "train", "real")


def build(information=lambda: 1.0, clip=None):
    torch.manual_seed(2)
    model, guide = Model(), Guide()
    shared = SharedOptimizer([*model.parameters(), *guide.parameters()], adam, RATE, clip)
    objective = ELBO(kl="analytic")
    return AggressiveSVI(model, guide, shared, objective, Batches(source(), BATCH, seed=7), ROWS // BATCH, information)


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def script(svi, losses):
    """Let the inner steps report these losses per datum."""
    left = iter(losses)
    svi._step_of = lambda moving, x: next(left) * x.shape[0]


@pytest.mark.parametrize(
    ("by_window", "steps"), [([3, 2, 1, 1], 40), ([3, 4], 20), ([1, float("nan")], 20), (range(20, 0, -1), MOST)]
)
def test_the_inner_loop_ends_where_ten_steps_bring_nothing(by_window, steps):
    svi = build()
    # within a window the loss may do what it likes: its mean counts
    wiggle = torch.linspace(-5, 5, WINDOW).tolist()
    script(svi, [torch.tensor(float(mean) + off) for mean in by_window for off in wiggle])
    assert svi.catch_up() == steps == svi.inner_steps


def test_encoder_and_decoder_take_turns():
    svi = build()
    x = next(iter(Batches(source(), BATCH)))
    model, guide = flat(svi.model), flat(svi.guide)
    svi.catch_up()
    assert torch.equal(flat(svi.model), model)
    assert not torch.equal(flat(svi.guide), guide)
    guide = flat(svi.guide)
    svi._step_of(svi.decoder, x)
    assert torch.equal(flat(svi.guide), guide)
    assert not torch.equal(flat(svi.model), model)


def test_its_steps_leave_no_parameters_in_pyros_store():
    """Where a second model whose nets have the same names would be trained on them."""
    pyro.clear_param_store()
    with pyro.settings.context(module_local_params=False):
        svi = build()
        svi.step(next(iter(Batches(source(), BATCH))))
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("clip", [None, 0.5])
def test_it_is_the_published_loop(clip):
    ours = build(clip=clip)
    model, guide, objective = copy.deepcopy(ours.model), copy.deepcopy(ours.guide), ELBO(kl="analytic")
    outer = list(Batches(source(), BATCH, seed=3))[:4]
    torch.manual_seed(5)
    for x in outer:
        ours.step(x)

    encoder = torch.optim.Adam(guide.parameters(), lr=RATE)  # two optimizers, as published
    decoder = torch.optim.Adam(model.parameters(), lr=RATE)
    inner = Batches(source(), BATCH, seed=7)
    torch.manual_seed(5)
    stream = (x for _ in range(1000) for x in inner)

    def move(optimizer, x):
        loss = objective.differentiable_loss(model, guide, x)
        parameters = optimizer.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        factor = 1.0 if clip is None else float((clip * len(x) / (norm + 1e-6)).clamp(max=1.0))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = factor * gradient
        optimizer.step()
        return float(loss.detach()) / len(x)

    total = 0
    for x in outer:
        previous, step = float("inf"), 0
        while step < 100:
            current = sum(move(encoder, next(stream)) for _ in range(10)) / 10
            step += 10
            if current >= previous:
                break
            previous = current
        move(decoder, x)
        total += step
    assert ours.inner_steps == total > 40
    assert torch.allclose(flat(ours.guide), flat(guide), atol=1e-10)
    assert torch.allclose(flat(ours.model), flat(model), atol=1e-10)


def test_it_ends_after_the_epoch_in_which_the_information_has_not_risen():
    seen = iter([0.2, 0.5, 0.4, 9.0])
    svi = build(lambda: next(seen))
    script(svi, [torch.tensor(1.0)] * 100_000)
    x = next(iter(Batches(source(), BATCH)))
    lasted = []
    for _ in range(5 * ROWS // BATCH):
        lasted.append(svi.aggressive)
        svi.step(x) if svi.aggressive else None
    assert lasted == [True] * 18 + [False] * 12  # three epochs of six steps
    assert svi.about() == {"train/inner_steps": 18 * 20, "train/aggressive_steps": 18}
    del svi._step_of
    model, guide = flat(svi.model), flat(svi.guide)
    svi.step(x)
    assert not torch.equal(flat(svi.model), model)
    assert not torch.equal(flat(svi.guide), guide)


@pytest.mark.parametrize("stop", [3, 6, 14])  # while it lasts, at the end of an epoch, and after
def test_a_resumed_run_is_the_same_run(tmp_path, stop):
    def trainer(folder, steps):
        values = iter([0.3, 0.1])  # it lasts two epochs
        svi = build(lambda: next(values) if svi.taken < 12 else 0.1)
        settings = TrainerSettings(steps=steps, learning_rate=RATE, log_every=5, validations=0)
        (tmp_path / folder).mkdir(exist_ok=True)
        return Trainer(svi, Batches(source(), BATCH, seed=3), settings, tmp_path / folder)

    torch.manual_seed(9)
    whole = trainer("whole", 18)
    torch.manual_seed(9)
    whole.fit()
    torch.manual_seed(9)
    first = trainer("parts", 18)
    torch.manual_seed(9)
    first.total_steps = stop
    first.fit()
    second = trainer("parts", 18)
    second.restore()
    assert second.svi.aggressive == (stop < 12)
    if stop >= 6:
        second.svi.measure = lambda: 0.1
    torch.rand(3)
    second.restore()
    second.fit()
    assert whole.svi.about() == second.svi.about()
    assert torch.equal(flat(whole.svi.model), flat(second.svi.model))
    assert torch.equal(flat(whole.svi.guide), flat(second.svi.guide))


def test_a_run_asks_for_it_by_a_word(tmp_path):
    words = ["inference=aggressive", "trainer.steps=4", "data.limit=300", "model.latent_dim=2"]
    for objective in ("beta", "free_bits", "annealed", "iwae", "infovae", "combined"):  # with whatever else is chosen
        setup = assemble(load([*words, f"objective={objective}"]))
        trainer = _trainer(setup, tmp_path, None)
        assert isinstance(trainer.svi, AggressiveSVI)
        assert 0 <= trainer.svi.measure() < torch.log(torch.tensor(200.0))
    assert type(_trainer(assemble(load(words[1:])), tmp_path, None).svi) is SVI


def test_what_it_cannot_take_turns_between_is_refused(tmp_path):
    setup = assemble(load(["inference=aggressive", "trainer.engine=compiled"]))
    with pytest.raises(ConfigError, match=r"inference=aggressive: .* accepted: trainer\.engine=eager"):
        _trainer(setup, tmp_path, None)
    setup = assemble(load(["inference=aggressive", "model=ppca", "guide=exact", "data=iris"]))
    with pytest.raises(ConfigError, match="inference=aggressive: it takes turns"):
        _trainer(setup, tmp_path, None)
