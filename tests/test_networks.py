"""The convolutions of whole networks: as many, of as many weights and multiplications, as their papers have."""

import pytest

from nhwconv.networks import NETWORKS, network

#: Convolutions, their weights, and the multiplications of one image of 224 x 224 (LeNet-5: 28 x 28), without biases,
#: normalisations and classifiers: as PyTorch's torchvision builds these networks.
KNOWN = {
    "lenet5": (2, 2_550, 240_000),
    "alexnet": (5, 2_468_544, 655_566_528),
    "vgg16": (13, 14_710_464, 15_346_630_656),
    "resnet18": (20, 11_166_912, 1_813_561_344),
    "resnet50": (53, 23_454_912, 4_087_136_256),
    "resnext50": (53, 22_911_680, 4_228_431_872),
    "densenet121": (120, 6_870_208, 2_833_137_664),
    "mobilenetv2": (52, 2_189_760, 299_494_272),
    "efficientnetb0": (81, 3_956_192, 384_534_752),
    "regnety400": (85, 3_870_784, 401_402_848),
    "convnext": (22, 1_877_472, 292_965_120),
    "vit": (1, 589_824, 115_605_504),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_as_large_as_it_is_known_to_be(name: str) -> None:
    parts = network(name)
    convolutions = sum(part.count for part in parts)
    weights = sum(part.count * p.d * p.kh * p.kw * p.c // p.groups for part in parts for p in [part.layer])
    products = sum(part.count * part.layer.problem().flops // 2 // part.layer.n for part in parts)
    assert (convolutions, weights, products) == KNOWN[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_each_layer_comes_once_and_the_first_takes_the_images(name: str) -> None:
    parts = network(name)
    assert len({part.layer.name for part in parts}) == len({part.layer.notation for part in parts}) == len(parts)
    assert all(part.layer.name.startswith(f"{name}.") for part in parts)
    assert (parts[0].layer.c, parts[0].count) == (1 if name == "lenet5" else 3, 1)
    assert all(part.layer.c > 3 for part in parts[1:])


def test_an_unknown_network_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'there is no network "resnet81", .*did you mean "resnet18"\?'):
        network("resnet81")
