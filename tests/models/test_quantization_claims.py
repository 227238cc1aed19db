"""What the lectures say of vector quantization, each claim measured where it is cheap to measure."""

import itertools
import math

import pytest
import torch
from sklearn.datasets import load_digits

from inference.codes import code_usage
from models.codebook import Codebook
from models.nets import MLP
from models.vq import HardCodes


def vectors():
    """2x2 patches of digits as grids of four numbers, ``(N, 4, 4, 4)``."""
    x = torch.tensor(load_digits().images[:300] / 16.0, dtype=torch.get_default_dtype())
    return (
        x.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).movedim(-1, 1)
    )  # (N, 8, 8) -> (N, 4, 4, 4 numbers) -> (N, D, H, W)


def codebook(size, z):
    book = Codebook(size, 4)
    book.start_at(z.movedim(1, -1).reshape(-1, 4))
    return book


@pytest.mark.row("3.36")
def test_the_copied_gradient_is_right_where_the_distortion_is_low():
    """It is the gradient of the loss at the code; wanted is that at the vector itself, by finite differences here."""
    z, net, step = vectors()[:20], MLP((4, 4, 4), (1, 8, 8), hidden=(16,)), 1e-5
    target = torch.rand(1, 8, 8)

    def loss(values):
        return (net(values) - target).square().flatten(1).sum(1)

    basis = torch.eye(64).reshape(64, 1, 4, 4, 4)
    with torch.no_grad():
        wanted = torch.stack([(loss(z + step * e) - loss(z - step * e)) / (2 * step) for e in basis], dim=1)  # (N, 64)
    cosines, distortions = [], []
    for size in (2, 4, 16, 64, 256):
        inputs = z.clone().requires_grad_()
        q = HardCodes(inputs, codebook(size, vectors()))
        loss(q.rsample()).sum().backward()
        cosines.append(float(torch.cosine_similarity(inputs.grad.flatten(1), wanted).mean()))
        distortions.append(float(q.losses().commitment.detach().mean()))
    assert all(a > b for a, b in itertools.pairwise(distortions)), distortions
    assert all(a < b for a, b in itertools.pairwise(cosines)), cosines
    assert cosines[0] < 0.99 < cosines[-1]


@pytest.mark.row("0.32")
def test_kmeans_uses_its_codes_more_evenly_than_a_random_codebook():
    z = vectors()
    means = codebook(16, z)
    scattered = Codebook(16, 4)
    with torch.no_grad():
        scattered.vectors.uniform_(0, 1)
    uses = [code_usage(HardCodes(z, book).codes, 16).perplexity for book in (means, scattered)]
    assert uses[1] < uses[0] - 2
    assert uses[0] <= 16


@pytest.mark.row("3.45")
def test_more_codes_trade_rate_for_distortion():
    z = vectors()
    curve = []
    for size in (2, 4, 8, 16, 32, 64):
        q = HardCodes(z, codebook(size, z))
        usage = code_usage(q.codes, size)
        curve.append((usage.entropy, float(q.losses().commitment.detach().mean())))
        assert usage.entropy <= math.log(size)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(curve)), curve


@pytest.mark.row("3.47")
def test_symbols_that_another_task_does_not_use_are_left_bit_for_bit():
    """Two tasks that fall on different codes: training on the second changes nothing of the first's."""
    first, second = torch.zeros(50, 4, 1, 1), torch.ones(50, 4, 1, 1)
    book = Codebook(4, 4)
    with torch.no_grad():
        book.vectors.copy_(torch.tensor([[0.1] * 4, [-0.1] * 4, [0.9] * 4, [1.1] * 4]))
    optimizer = torch.optim.SGD(book.parameters(), lr=0.1)

    def train(z):
        used = set()
        for _ in range(20):
            optimizer.zero_grad()
            q = HardCodes(z + 0.05 * torch.randn_like(z), book)
            used |= set(q.codes.flatten().tolist())
            q.losses().codebook.mean().backward()
            untouched = [code for code in range(4) if code not in set(q.codes.flatten().tolist())]
            assert torch.equal(book.vectors.grad[untouched], torch.zeros(len(untouched), 4))
            optimizer.step()
        return used

    assert train(first) == {0, 1}
    before = book.vectors.detach().clone()
    assert train(second) == {2, 3}
    assert torch.equal(book.vectors[:2], before[:2])
    assert not torch.equal(book.vectors[2:], before[2:])
