"""Codebook, straight-through gradient and quantization losses, by hand, by brute force and by scikit-learn."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

from models.codebook import Codebook, quantization_losses, straight_through


def clusters(count=60, spread=0.1):
    """Well separated points around the corners of a square, and the mean of each corner's points."""
    corners = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
    points = corners.repeat_interleave(count, 0) + spread * torch.randn(4 * count, 2)
    return points, points.unflatten(0, (4, count)).mean(1), corners + 0.7


def book(vectors, **options):
    made = Codebook(*vectors.shape, **options)
    with torch.no_grad():
        made.vectors.copy_(vectors)
    return made


@pytest.mark.row("0.33", "2.18", "2.19", "3.29", "4.10")
def test_lookup_is_the_nearest_by_brute_force():
    codebook, inputs = Codebook(7, 3), torch.randn(5, 2, 3, 3) * 0.2
    codes = codebook.nearest(inputs)
    distances = cdist(inputs.reshape(-1, 3).numpy(), codebook.vectors.detach().numpy())
    assert np.array_equal(codes.reshape(-1).numpy(), distances.argmin(1))
    assert len(codes.unique()) > 2
    assert torch.equal(codebook.embed(codes), codebook.vectors[codes])
    assert codes.dtype == torch.long


def test_ties_go_to_the_first_code():
    codebook = book(torch.tensor([[2.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    assert codebook.nearest(torch.zeros(1, 2)).tolist() == [1]
    assert codebook.nearest(torch.tensor([[0.9, 5.0]])).tolist() == [2]
    many = Codebook(64, 8)
    with torch.no_grad():
        many.vectors[32:] = many.vectors[:32]
    assert many.nearest(100 * torch.randn(500, 8)).max() < 32


def test_near_ties_are_told_apart():
    """Far from the origin, distances from inner products drown in rounding; these do not."""
    codebook = book(torch.tensor([[1e6, 0.0], [1e6, 2e-6]]))
    inputs = torch.tensor([[1e6, 0.9e-6], [1e6, 1.1e-6]]).repeat(40, 1)
    assert codebook.nearest(inputs).tolist() == [0, 1] * 40


@pytest.mark.row("0.35", "2.20", "3.35", "4.13")
def test_straight_through_copies_the_gradient():
    soft, hard, gradient = (
        torch.randn(4, 3, requires_grad=True),
        torch.randn(4, 3, requires_grad=True),
        torch.randn(4, 3),
    )
    made = straight_through(hard, soft)
    assert torch.equal(made, hard)
    (made * gradient).sum().backward()
    assert torch.allclose(soft.grad, gradient, atol=1e-12)
    assert hard.grad is None


@pytest.mark.row("0.35")
def test_straight_through_one_hot_has_the_gradient_of_the_softmax():
    logits, u = torch.randn(5, requires_grad=True), torch.randn(5)
    p = logits.softmax(0)
    hard = torch.nn.functional.one_hot(logits.argmax(), 5).to(p.dtype)
    made = straight_through(hard, p)
    assert torch.equal(made, hard)
    (gradient,) = torch.autograd.grad(made @ u, logits)
    by_hand = (p.diag() - torch.outer(p, p)) @ u
    assert by_hand.abs().max() > 1e-2
    assert torch.allclose(gradient, by_hand.detach(), atol=1e-12)


@pytest.mark.row("0.34", "3.32", "2.22")
def test_loss_gradients_by_hand():
    z, e = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    losses = quantization_losses(z, e)
    squared = (z - e).square().sum(-1)
    beta = 0.25
    assert torch.allclose(losses.codebook + beta * losses.commitment, (1 + beta) * squared, atol=1e-12)
    dz, de = torch.autograd.grad((losses.codebook + beta * losses.commitment).sum(), (z, e))
    assert torch.allclose(dz, 2 * beta * (z - e), atol=1e-10)
    assert torch.allclose(de, 2 * (e - z), atol=1e-10)


@pytest.mark.row("0.34")
def test_the_three_published_fields_are_settings_of_two_weights():
    """The plain squared distance, beta times it, and the stop-gradient form: one value up to scale, three fields."""
    z, e = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)

    def field(rate, commitment):
        losses = quantization_losses(z, e)
        return torch.autograd.grad((rate * losses.codebook + commitment * losses.commitment).sum(), (z, e))

    plain = torch.autograd.grad((z - e).square().sum(), (z, e))
    for made, wanted in zip(field(1.0, 1.0), plain, strict=True):
        assert torch.allclose(made, wanted, atol=1e-12)
    for made, wanted in zip(field(0.25, 0.25), plain, strict=True):
        assert torch.allclose(made, 0.25 * wanted, atol=1e-12)
    paper = field(1.0, 0.25)
    assert not torch.allclose(paper[0], plain[0])
    assert not torch.allclose(paper[0] / paper[1], plain[0] / plain[1])


@pytest.mark.row("3.37")
def test_the_two_weights_are_independent():
    z, e = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)

    def field(rate, commitment):
        losses = quantization_losses(z, e)
        return torch.autograd.grad((rate * losses.codebook + commitment * losses.commitment).sum(), (z, e))

    (dz, de), (dz_rate, de_rate), (dz_beta, de_beta) = field(1.0, 0.25), field(7.0, 0.25), field(1.0, 3.0)
    assert torch.allclose(dz_rate, dz, atol=1e-12)
    assert torch.allclose(de_rate, 7 * de, atol=1e-12)
    assert torch.allclose(de_beta, de, atol=1e-12)
    assert torch.allclose(dz_beta, 12 * dz, atol=1e-12)


def test_moving_averages_by_hand():
    codebook = book(torch.tensor([[0.0], [10.0], [99.0]]), ema=True, decay=0.9)
    first, second = torch.tensor([[1.0], [2.0], [11.0]]), torch.tensor([[3.0], [9.0], [13.0]])
    codebook.update(first, codebook.nearest(first))
    assert torch.allclose(codebook.vectors, torch.tensor([[1.5], [11.0], [99.0]]), atol=1e-12)
    assert torch.allclose(codebook.usage(), torch.tensor([2.0, 1.0, 0.0]), atol=1e-12)
    codebook.update(second, codebook.nearest(second))
    zero = (0.9 * 3 + 3) / (0.9 * 2 + 1)
    one = (0.9 * 11 + 22) / (0.9 * 1 + 2)
    assert torch.allclose(codebook.vectors, torch.tensor([[zero], [one], [99.0]]), atol=1e-12)
    assert not list(codebook.parameters())


def test_updates_do_nothing_in_evaluation():
    codebook = Codebook(3, 2, ema=True, restart_below=0.1).eval()
    before = {name: tensor.clone() for name, tensor in codebook.state_dict().items()}
    codebook.update(torch.randn(9, 2), torch.zeros(9, dtype=torch.long))
    assert all(torch.equal(tensor, before[name]) for name, tensor in codebook.state_dict().items())


@pytest.mark.row("0.36", "3.34")
def test_moving_averages_end_at_cluster_means():
    points, means, start = clusters()
    codebook = book(start, ema=True, decay=0.9)
    assert (codebook.vectors - means).abs().max() > 0.5
    for _ in range(150):
        codebook.update(points, codebook.nearest(points))
    assert torch.allclose(codebook.vectors, means, atol=1e-4)


@pytest.mark.row("0.36", "3.33", "3.34")
@pytest.mark.parametrize("rate", [0.1, 1.0, 10.0])
def test_gradient_descent_ends_at_the_fixed_point_of_kmeans_whatever_the_rate(rate):
    points, _, start = clusters(spread=0.5)
    codebook = book(start)
    optimizer = torch.optim.SGD(codebook.parameters(), lr=0.1 * rate)
    oracle = KMeans(4, init=start.numpy(), n_init=1, tol=0).fit(points.numpy()).cluster_centers_
    assert np.abs(codebook.vectors.detach().numpy() - oracle).max() > 0.5
    for _ in range(int(250 / min(rate, 1))):
        optimizer.zero_grad()
        quantization_losses(points, codebook.embed(codebook.nearest(points))).codebook.mean().backward()
        optimizer.step()
    assert np.abs(codebook.vectors.detach().numpy() - oracle).max() < 1e-4


def test_kmeans_start_finds_separated_clusters():
    points, means, _ = clusters()
    codebook = Codebook(4, 2)
    assert torch.cdist(means, codebook.vectors).min(1).values.max() > 1
    codebook.start_at(points)
    assert torch.cdist(means, codebook.vectors).min(1).values.max() < 1e-8


def test_kmeans_survives_fewer_points_than_codes():
    points, codebook = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), Codebook(5, 2)
    codebook.start_at(points)
    assert torch.cdist(points, codebook.vectors).min(1).values.max() == 0
    assert torch.cdist(codebook.vectors, points).min(1).values.max() == 0


@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "ema"])
def test_dead_codes_restart_on_inputs(ema):
    points, _, _ = clusters()
    far = torch.tensor([[0.0, 0.0], [500.0, 0.0], [0.0, 500.0], [500.0, 500.0]])
    codebooks = [book(far, ema=ema, decay=0.9, restart_below=threshold) for threshold in (0.0, 0.5)]
    used = []
    for codebook in codebooks:
        for _ in range(60):
            codebook.update(points, codebook.nearest(points))
        used.append(len(codebook.nearest(points).unique()))
    assert used[0] == 1
    assert used[1] == 4


@pytest.mark.parametrize(
    "options",
    [{"size": 1}, {"dim": 0}, {"decay": 1.0}, {"restart_below": -1.0}, {"restart_below": math.nan}],
    ids=lambda o: "_".join(map(str, *o.items())),
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        Codebook(**{"size": 4, "dim": 2, **options})
