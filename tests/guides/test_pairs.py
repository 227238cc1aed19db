"""Every guide that has a word with every objective that has one, on a model for it: it trains, or says why not.

Which pairs are valid is written down here once more, by what guides can and what objectives ask. A guide or objective
that is new joins by its line in the catalog; until it is described here it must train or refuse, either.
"""

import inspect

import pyro
import pytest
import torch
from torch import nn

from inference.assemble import assemble
from inference.catalog import CATALOG
from inference.config import ConfigError, load
from inference.engine import SVI, SharedOptimizer
from inference.structure import StructureError

COMPOSED = ["model.latent_dim=3", "decoder.hidden=[6]"]
BITS, GMM = [*COMPOSED, "prior=bits"], ["model=gmm"]
TWO = ["model=two_layer", "model.latent_dim=3", "model.top_dim=2", "model.hidden=[6]", "decoder.hidden=[6]"]
HOMES = {
    **dict.fromkeys(("bottom_up", "top_down", "ladder"), TWO),
    "exact": ["model=ppca", "model.latent_dim=2"],
    "quantized": ["model=vq", "model.code_dim=3", "decoder.hidden=[6]"],
    **dict.fromkeys(("bits", "concrete", "straight_through", "straight_through_mean", "enumerated"), BITS),
    "onehot": ["model.latent_dim=2", "decoder.hidden=[6]", "prior=onehot", "prior.classes=3"],
    **dict.fromkeys(("enumerated_exact", "enumerated_hard", "enumerated_uniform", "summed_out"), GMM),
    "clustering": ["model=gmm_vae", "model.latent_dim=3", "model.components=3", "decoder.hidden=[6]"],
    "quantized_levels": ["model=vq_levels", "model.code_dim=3", "model.grid=[2,2]", "decoder.hidden=[6]"],
}
SMALL_GUIDE = {"hidden": "[6]", "transforms": "2", "context_dim": "4", "features": "4", "components": "3", "steps": "3"}
SMALL_OBJECTIVE = {"particles": "4", "groups": "2", "partitions": "2"}


def arguments(guide, objective):
    """The words of a small run; without one for the objective where that is None."""
    options = inspect.signature(CATALOG["guide"][guide]).parameters
    taken = inspect.signature(CATALOG["objective"][objective]).parameters if objective else ()
    return [
        "data=iris", "device=cpu", f"guide={guide}", *HOMES.get(guide, COMPOSED),
        *([f"objective={objective}"] if objective else []),
        *(f"guide.{name}={value}" for name, value in SMALL_GUIDE.items() if name in options),
        *(f"objective.{name}={value}" for name, value in SMALL_OBJECTIVE.items() if name in taken),
        *(["encoder.hidden=[6]"] if "net" in options else []),
    ]  # fmt: skip


def two_steps(guide, objective):
    """None, or why the pair is refused; every parameter that is trained must have a finite gradient at both steps."""
    try:
        setup = assemble(load(arguments(guide, objective)))
        programs, x = nn.ModuleList([setup.model, setup.guide]), torch.rand(5, 4)
        optimizer = SharedOptimizer(programs.parameters(), setup.config.factory("optimizer"), 0.01)
        svi = SVI(setup.model, setup.guide, optimizer, setup.objective)
        for part in programs.modules():
            getattr(part, "initialize", lambda x: None)(torch.rand(40, 4))
        for checked in (True, False):
            with pyro.validation_enabled(checked):
                svi.loss_and_grads(setup.model, setup.guide, x)
            for name, parameter in programs.named_parameters():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
            optimizer(batch_size=len(x))
            optimizer.zero_grad()
        return None
    except (ConfigError, StructureError) as error:
        return str(error)


GAUSSIAN = {"diagonal", "unconditional", "free", "semi_amortized", "family"}
JOINT = {"low_rank", "full", "exact"}
NO_CLOSED_FORM = {"mixture", "planar", "sylvester", "realnvp", "iaf", "spline"}
DRAWN, SOFT = {"bits", "onehot"}, {"concrete"}
STRAIGHT = {"straight_through", "straight_through_mean"}
LAYERS = {"bottom_up", "top_down", "ladder"}
SUMMED = {"enumerated", "enumerated_exact", "enumerated_uniform", "summed_out"}
POINT = {"deterministic"}
DESCRIBED = set().union(GAUSSIAN, JOINT, NO_CLOSED_FORM, DRAWN, SOFT, STRAIGHT, LAYERS, SUMMED, POINT, {"quantized"})
READING = {"ladder", "semi_amortized"}  # parameters of the model, with a gradient
WEIGHING = {"iwae", "renyi", "miwae", "ciwae", "piwae", "tvo", "wake_sleep"}


def valid(guide, objective):
    """Which pairs are, with each objective's own default gradient."""
    if objective == "vq":
        return guide == "quantized"
    if objective == "trace_enum":
        return guide in SUMMED
    if guide in SUMMED | {"quantized"}:
        return False
    if guide in POINT:  # no density to weigh by, nor a divergence
        return objective not in WEIGHING | {"free_bits"}
    if guide in DRAWN:  # no path
        return objective in {"trace_elbo", "trace_graph", "tvo", "wake_sleep"}
    if guide in SOFT:  # not distributed as log q says
        return objective not in {"trace_elbo", "trace_graph", "tvo", "wake_sleep", "piwae"}
    if guide in READING and objective in {"piwae", "wake_sleep"}:  # two targets for a parameter of the model
        return False
    if objective == "free_bits":  # a closed-form KL for each dimension
        return guide in GAUSSIAN | STRAIGHT | {"top_down", "ladder"}
    if guide == "bottom_up" and objective == "trace_mean_field":  # latents in another order
        return False
    return objective != "infovae" or guide not in LAYERS


@pytest.mark.row("5.6", "5.7")
@pytest.mark.parametrize("objective", CATALOG["objective"])
@pytest.mark.parametrize("guide", CATALOG["guide"])
def test_it_trains_two_steps_or_says_why_not(guide, objective):
    """Warnings are errors here: no pair warns and goes on."""
    torch.set_default_dtype(torch.float32)  # the next test's fixture undoes it
    refusal = two_steps(guide, objective)
    assert refusal is None or len(refusal) > 40
    if guide in DESCRIBED and objective in KNOWN:
        assert (refusal is None) == valid(guide, objective), refusal


@pytest.mark.parametrize("guide", CATALOG["guide"])
def test_a_guide_on_its_model_trains_without_a_word_for_the_objective(guide):
    torch.set_default_dtype(torch.float32)
    assert two_steps(guide, None) is None


KNOWN = WEIGHING | {
    "vq", "trace_elbo", "trace_mean_field", "trace_graph", "trace_enum", "elbo", "beta", "annealed", "free_bits",
    "infovae",
}  # fmt: skip
