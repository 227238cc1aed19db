"""Local nets: a token describes what lies around its place."""

import pytest
import torch

from models.local_nets import LocalDecoder, LocalEncoder, halvings


@pytest.mark.parametrize(
    ("image", "grid"),
    [((1, 8, 8), (2, 2)), ((1, 8, 8), (4, 4)), ((1, 28, 28), (7, 7)), ((3, 32, 32), (8, 8)), ((1, 28, 20), (7, 5))],
)
def test_images_become_grids_and_images_again(image, grid):
    encoder = LocalEncoder(image, (5, *grid), channels=6)
    decoder = LocalDecoder((5, *grid), image, channels=6)
    x = torch.randn(2, 3, *image)
    codes = encoder(x)
    assert torch.allclose(codes[1, 2], encoder(x[1, 2]), atol=1e-12)
    assert codes.shape == (2, 3, 5, *grid)
    assert decoder(codes).shape == (2, 3, *image)


def test_a_token_sees_its_surroundings_alone():
    encoder = LocalEncoder((1, 32, 32), (3, 8, 8), channels=6, blocks=1)
    x = torch.randn(1, 1, 32, 32, requires_grad=True)
    encoder(x)[0, :, 0, 0].sum().backward()
    seen = x.grad[0, 0] != 0
    assert seen[:4, :4].all()
    assert not seen[16:].any()
    assert not seen[:, 16:].any()


def test_a_pixel_is_made_of_the_tokens_around_it():
    decoder = LocalDecoder((3, 8, 8), (1, 32, 32), channels=6, blocks=1)
    z = torch.randn(1, 3, 8, 8, requires_grad=True)
    decoder(z)[0, 0, 0, 0].backward()
    seen = (z.grad[0] != 0).any(0)
    assert seen[0, 0]
    assert not seen[4:].any()


def test_signals_keep_their_size():
    x = torch.randn(64, 3, 32, 32)
    z = LocalEncoder((3, 32, 32), (8, 8, 8), channels=32)(x)
    assert 0.3 < z.std() < 5
    assert 0.1 < LocalDecoder((8, 8, 8), (3, 32, 32), channels=32)(z / z.std()).std() < 5


def test_grids_that_no_halving_reaches_are_refused():
    assert halvings((1, 7, 5), (4, 2, 2), "it") == [(7, 5), (4, 3), (2, 2)]
    with pytest.raises(ValueError, match="LocalEncoder halves an image of 8x8: accepted: grids of 8x8, 4x4, 2x2, 1x1"):
        LocalEncoder((1, 8, 8), (3, 3, 3))
    with pytest.raises(ValueError, match=r"goes between images.*accepted for others: mlp"):
        LocalDecoder((3,), (1, 8, 8))
    with pytest.raises(ValueError, match="channels must be at least 1"):
        LocalDecoder((3, 2, 2), (1, 8, 8), channels=0)
