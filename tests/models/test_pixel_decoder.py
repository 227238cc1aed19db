"""The PixelCNN likelihood against sums over all images, Jacobians and frequencies."""

import itertools
from functools import partial

import pytest
import torch

from models.nets import MLP
from models.pixel_decoder import PixelCNNLikelihood

NET = partial(MLP, hidden=(6,))


def likelihood(shape=(1, 2, 3), levels=2, seed=0, **options):
    torch.manual_seed(seed)
    made = PixelCNNLikelihood(shape, (2,), NET, levels, **{"channels": 4, "layers": 2, "kernel": 3, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def every_image(shape, levels):
    numbers = torch.tensor(list(itertools.product(range(levels), repeat=shape[1] * shape[2])))
    return numbers.to(torch.get_default_dtype()).reshape(-1, *shape)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(("shape", "levels"), [((1, 2, 3), 2), ((1, 3, 3), 2), ((1, 2, 2), 4)])
def test_the_mass_of_all_images_is_one_whatever_the_latent(shape, levels, everywhere):
    made, images = likelihood(shape, levels, channels=8, everywhere=everywhere), every_image(shape, levels)
    z = torch.randn(3, 1, 2)
    mass = made(z).log_prob(images).exp()  # (3, images)
    assert mass.shape == (3, levels ** (shape[1] * shape[2]))
    assert torch.allclose(mass.sum(1), torch.ones(3), atol=1e-12)
    assert (mass[0] - mass[1]).abs().max() > 1e-3  # and the latent matters


@pytest.mark.parametrize(("layers", "kernel"), [(1, 3), (1, 5), (2, 3)])
def test_a_pixel_sees_what_its_depth_and_kernel_say_and_nothing_below_or_to_the_right(layers, kernel):
    height, width = 5, 6
    made = likelihood((1, height, width), layers=layers, kernel=kernel, channels=8)
    condition = made.net(torch.randn(5, 2))
    jacobian = (
        torch.autograd.functional.jacobian(
            lambda x: made.pixels.logits(x, condition)[:, 1], torch.rand(5, 1, height, width)
        )[:, :, :, :, 0]
        .abs()
        .sum((0, 3))
    )  # (5, H, W, 5, H, W) -> (H, W, H, W)
    reach = layers * (kernel // 2)
    for row, column in itertools.product(range(height), range(width)):
        seen = jacobian[row, column] != 0
        allowed = torch.zeros(height, width, dtype=torch.bool)
        allowed[max(0, row - reach - 1) : row, max(0, column - reach) : column + reach + 1] = True
        allowed[row, max(0, column - reach - 1) : column] = True
        assert not (seen & ~allowed).any()
        assert row == 0 or seen[row - 1, column]
        assert column == 0 or seen[row, column - 1]
        assert not (row and column + 1 < width) or seen[row - 1, column + 1]  # no blind spot


def test_the_map_enters_at_every_layer():
    made = likelihood((1, 4, 4), layers=3)
    condition = made.net(torch.randn(1, 2))
    x = torch.bernoulli(torch.full((1, 1, 4, 4), 0.5))
    whole = made.pixels.log_mass(x, condition)
    for layer in made.pixels.layers:
        weight = layer.condition.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
            assert (made.pixels.log_mass(x, condition) - whole).abs() > 1e-6
            weight.copy_(kept)


@pytest.mark.parametrize("everywhere", [False, True])
def test_drawing_row_by_row_uses_the_same_logits(everywhere):
    made = likelihood((1, 9, 5), layers=2, kernel=3, everywhere=everywhere)  # taller than what a row sees
    condition = made.net(torch.randn(4, 2))
    x = torch.bernoulli(torch.full((4, 1, 9, 5), 0.5))
    whole = made.pixels.logits(x, condition)
    for row in range(9):
        above = made.pixels._seen_from(row, x, condition)
        here = made.pixels._row_logits(row, x[:, :, row : row + 1], above)
        assert torch.allclose(here[:, :, 0], whole[:, :, row], atol=1e-12)


def test_draws_come_as_often_as_they_should():
    made, images = likelihood((1, 2, 2)), every_image((1, 2, 2), 2)
    count = 20_000
    p_x = made(torch.randn(2))
    expected = p_x.expand((16,)).log_prob(images).exp().detach()
    places = (p_x.sample((count,)).flatten(1) @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long()
    seen = torch.bincount(places, minlength=16) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((seen - expected.flip(0)).abs() / error).max() > 5  # a wrong answer would be found out
    assert ((seen - expected).abs() / error).max() < 5


def test_it_starts_at_the_frequencies_of_the_data():
    made = PixelCNNLikelihood((1, 2, 2), (2,), NET, levels=3, channels=4)
    with torch.no_grad():
        made.pixels.head[-1].weight.zero_()
    x = torch.randint(3, (50, 1, 2, 2)).to(torch.get_default_dtype())
    made.initialize(x)
    first = made.pixels.logits(x[:1], made.net(torch.zeros(1, 2))).softmax(1)[0, :, 0, 0]
    counts = torch.tensor([(x[:, 0, 0, 0] == level).sum() for level in range(3)])
    assert torch.allclose(first, (counts + 1) / 53, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (3, 4, 4)}, r"\(1, H, W\)"),
        ({"kernel": 4}, "odd"),
        ({"layers": 0}, "at least 1"),
        ({"features": 0}, "features"),
    ],
)
def test_what_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        likelihood(**change)
