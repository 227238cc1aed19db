"""Networks: shapes, batches, beginnings and messages."""

from functools import partial

import pytest
import torch

from models.local_nets import LocalDecoder
from models.nets import ACTIVATIONS, MLP, ConvDecoder, ConvEncoder, GatedMLP, Linear, SkipMLP, stacked_shape

IMAGES = [(1, 8, 8), (1, 28, 28), (1, 28, 20), (3, 32, 32), (1, 7, 5), (2, 1, 1)]
LEADING = [(), (4,), (3, 4), (2, 3, 4)]
SMALL = (8, 8)
DENSE = {"Linear": Linear, "MLP": partial(MLP, hidden=SMALL), "GatedMLP": partial(GatedMLP, hidden=SMALL)}
DENSE["SkipMLP"] = partial(SkipMLP, hidden=SMALL)


def all_nets(image):
    nets = {name: net(image, (5,)) for name, net in DENSE.items()}
    nets |= {f"{name} decoder": net((5,), image) for name, net in DENSE.items()}
    nets["ConvEncoder"] = ConvEncoder(image, (2, 3), channels=(4, 6))
    nets["ConvDecoder"] = ConvDecoder((2, 3), image, channels=(6, 4))
    grid = (2, (image[1] + 1) // 2, (image[2] + 1) // 2)
    nets["LocalDecoder"] = LocalDecoder(grid, image, channels=4, blocks=1)
    return nets


@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_any_image_size_and_any_number_of_batch_dimensions(image):
    for name, net in all_nets(image).items():
        for leading in LEADING:
            output = net(torch.randn(*leading, *net.in_shape))
            assert output.shape == (*leading, *net.out_shape), name


@pytest.mark.parametrize("image", [(1, 8, 8), (2, 7, 6)], ids=str)
def test_a_batch_is_a_loop(image):
    for name, net in all_nets(image).items():
        x = torch.randn(2, 3, *net.in_shape)
        loop = torch.stack([torch.stack([net(one) for one in row]) for row in x])
        assert torch.allclose(net(x), loop, atol=1e-12), name
        assert not torch.allclose(loop[0], loop[1], atol=1e-3), name


def test_an_empty_batch_passes():
    for net in all_nets((1, 8, 8)).values():
        assert net(torch.randn(0, *net.in_shape)).shape == (0, *net.out_shape)


def test_dense_nets_neither_copy_their_input_nor_their_output():
    net = Linear((2, 3), (4,))
    net.hidden.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].data_ptr()))
    seen: list[int] = []
    x = torch.randn(7, 2, 3)
    assert net(x)._base is None or net(x)._base.shape == (7, 4)
    assert seen[0] == x.data_ptr()


def test_mlp_is_the_formula():
    net = MLP((2, 2), (3,), hidden=(5,), activation="softplus")
    first, last, x = net.hidden[0], net.output, torch.randn(6, 2, 2)
    by_hand = torch.log1p(torch.exp(x.flatten(1) @ first.weight.T + first.bias)) @ last.weight.T + last.bias
    assert torch.allclose(net(x), by_hand, atol=1e-12)


def test_gated_layer_is_the_formula():
    net = GatedMLP((4,), (2,), hidden=(3,))
    layer, x = net.hidden[0].both, torch.randn(6, 4)
    (a, b), (c, d) = layer.weight.split(3), layer.bias.split(3)
    by_hand = (x @ a.T + c) * torch.sigmoid(x @ b.T + d)
    assert torch.allclose(net(x), by_hand @ net.output.weight.T + net.output.bias, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_starts_with_signals_of_order_one(activation):
    output = MLP((100,), (50,), hidden=(200, 200), activation=activation)(torch.randn(500, 100))
    assert 0.1 < output.std() < 2


def test_gated_and_convolutional_nets_start_with_signals_of_order_one():
    nets = [GatedMLP((100,), (50,)), ConvEncoder((1, 28, 28), (50,)), ConvDecoder((20,), (1, 28, 28))]
    for net in nets:
        assert 0.2 < net(torch.randn(100, *net.in_shape)).std() < 2, net


def test_setting_the_output_bias_moves_the_output():
    for name, net in all_nets((1, 8, 8)).items():
        x, shift = torch.randn(3, *net.in_shape), torch.randn(net.out_shape)
        before = net(x)
        with torch.no_grad():
            net.output_bias.add_(shift)
        assert torch.allclose(net(x), before + shift, atol=1e-12), name


def test_every_parameter_gets_a_gradient():
    for name, net in all_nets((1, 8, 8)).items():
        net(torch.randn(16, *net.in_shape)).square().sum().backward()
        for key, parameter in net.named_parameters():
            assert parameter.grad is not None, (name, key)
            assert parameter.grad.abs().sum() > 0, (name, key)


def test_stacked_shape_keeps_images_images():
    assert stacked_shape((3, 8, 6), 2) == (6, 8, 6)
    assert stacked_shape((5,), 4) == (20,)
    with pytest.raises(ValueError, match=r"at least one dimension, got event_shape \(\)"):
        stacked_shape((), 2)


def test_bad_options_are_refused_with_what_is_accepted():
    with pytest.raises(ValueError, match=r"unknown activation 'sine'; accepted: elu, gelu.*tanh"):
        MLP((4,), (2,), activation="sine")
    with pytest.raises(ValueError, match="hidden must be positive"):
        GatedMLP((4,), (2,), hidden=(3, 0))
    with pytest.raises(ValueError, match=r"ConvEncoder's input needs an image shape .* got \(784,\)"):
        ConvEncoder((784,), (2,))
    with pytest.raises(ValueError, match="channels must name at least one layer"):
        ConvDecoder((2,), (1, 8, 8), channels=())


@pytest.mark.parametrize("wrong", [(3, 64), (3, 8, 8), (8,), ()], ids=str)
def test_a_wrong_input_shape_is_one_message(wrong):
    nets = [Linear((1, 8, 8), (2,)), ConvEncoder((1, 8, 8), (2,)), ConvDecoder((1, 8, 8), (1, 8, 8))]
    for net in nets:
        with pytest.raises(ValueError, match=r"expected an input of shape \(\.\.\., 1, 8, 8\), got"):
            net(torch.zeros(wrong))


def test_a_skip_net_is_the_formula_and_reads_its_input_at_every_layer():
    net = SkipMLP((2,), (3,), hidden=(4, 5))
    z = torch.randn(7, 2)
    first, second = net.hidden
    one = torch.cat([torch.tanh(z @ first.weight.T + first.bias), z], 1)
    two = torch.cat([torch.tanh(one @ second.weight.T + second.bias), z], 1)
    assert torch.allclose(net(z), two @ net.output.weight.T + net.output.bias, atol=1e-12)
    with torch.no_grad():
        first.weight.zero_()  # cut the way through the layers: the input still arrives
        assert net(z).std(0).min() > 1e-3
        plain = MLP((2,), (3,), hidden=(4, 5))
        plain.hidden[0].weight.zero_()
        assert plain(z).std(0).max() < 1e-12
    with pytest.raises(ValueError, match="at least one layer"):
        SkipMLP((2,), (3,), hidden=())
