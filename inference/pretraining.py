"""Starting a run from another one: its parameters, and a mixture prior fitted to its codes."""

from pathlib import Path

import torch
from torch import Tensor, nn

from inference import checkpoint
from inference.config import ConfigError
from inference.em import EMError, EMSettings, fit
from inference.particles import encode
from models.gmm import GaussianMixture

CODES_AT_ONCE = 512


def start_from_run(folder: str, model: nn.Module, guide: nn.Module, x: Tensor) -> None:
    """Copy those parameters of a finished run that agree in name and shape; fit a mixture prior that it did not have.

    The mixture is fitted by EM to codes z ~ q(z|x) of training data: the aggregated posterior is what a prior is best
    (row by row the start of Jiang et al. 2017, section 3.3, there with means for draws).

    Args:
        folder: of the run.
        model: as it was assembled.
        guide: its guide.
        x: training data to encode, ``(N, *event_shape)``.

    Raises:
        ConfigError: no such run, nothing in common with it, or codes that no mixture fits.
    """
    if not checkpoint.exists(Path(folder) / "checkpoint"):
        raise ConfigError(f"run.start={folder} holds no checkpoint; accepted: the folder of a run that was trained")
    tensors, _ = checkpoint.load(Path(folder) / "checkpoint")
    taken = {
        name: _take(checkpoint.under(name, tensors), program) for name, program in (("model", model), ("guide", guide))
    }
    if not any(taken.values()):
        raise ConfigError(
            f"run.start={folder} has no parameter in common with this model and guide; accepted: a run with the same "
            "nets and latents"
        )
    for name, part in model.named_modules():
        if hasattr(part, "become") and not any(key.startswith(f"{name}.") for key in taken["model"]):
            _fit_to_codes(part, guide, x, folder)


def _take(theirs: dict[str, Tensor], program: nn.Module) -> set[str]:
    """Copy what agrees; returns the names."""
    ours = program.state_dict()
    same = {name: value for name, value in theirs.items() if name in ours and ours[name].shape == value.shape}
    program.load_state_dict(same, strict=False)
    return set(same)


def _fit_to_codes(prior: nn.Module, guide: nn.Module, x: Tensor, folder: str) -> None:
    codes = draw_codes(guide, x)
    try:
        mixture = fit_mixture(codes, len(prior.logits))  # type: ignore[arg-type]
    except (EMError, ValueError) as error:
        raise ConfigError(f"run.start={folder}: no mixture fits its codes: {error}") from error
    scale = mixture.log_scale.exp().expand_as(mixture.loc)
    prior.become(mixture.logits.detach(), mixture.loc.detach(), scale.detach())  # type: ignore[operator]


@torch.no_grad()
def draw_codes(guide: nn.Module, x: Tensor, means: bool = False) -> Tensor:
    """One z ~ q(z|x) for each datum, or its mean, ``(N, D)``."""
    parts = []
    for some in x.split(CODES_AT_ONCE):
        q = encode(guide, some)["z"]
        parts.append((q.mean if means else q.sample()).flatten(1))  # (n, *event) -> (n, D)
    return torch.cat(parts)


def fit_mixture(codes: Tensor, components: int, restarts: int = 5, seed: int = 0) -> GaussianMixture:
    """A diagonal Gaussian mixture fitted by EM, the best of several starts."""
    mixture = GaussianMixture(codes.shape[1:], components, "diagonal", ridge=1e-3).to(codes)
    fit(mixture, codes, EMSettings(restarts=restarts, seed=seed, tolerance=1e-4))
    return mixture
