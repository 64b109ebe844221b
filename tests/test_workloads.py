"""The layers of real networks, the notation, and the data."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nhwconv.problem import ConvProblem
from nhwconv.workloads import WORKLOADS, Layer, make_data, parse_layer, workload


def test_every_workload_has_layers_named_after_it_once() -> None:
    layers = [layer for name in WORKLOADS for layer in workload(name)]
    names = [layer.name for layer in layers]
    assert len(set(names)) == len(names)
    assert all(layer.name.startswith(f"{name}.") for name in WORKLOADS for layer in workload(name))
    assert set(WORKLOADS) == {
        "article", "lenet5", "cifar", "alexnet", "vgg16", "resnet50", "resnext50", "regnet", "shufflenet",
        "mobilenetv2", "efficientnet", "convnext", "vit", "unet", "deeplab",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "x", "w", "y"),
    [
        ("article.4x4", (1, 4, 4, 1), (1, 2, 2, 1), (1, 3, 3, 1)),
        ("lenet5.1", (64, 28, 28, 1), (6, 5, 5, 1), (64, 24, 24, 6)),
        ("alexnet.1", (8, 227, 227, 3), (96, 11, 11, 3), (8, 55, 55, 96)),
        ("resnet50.stem", (8, 224, 224, 3), (64, 7, 7, 3), (8, 112, 112, 64)),
        ("resnet50.3.3x3s2", (8, 56, 56, 128), (128, 3, 3, 128), (8, 28, 28, 128)),
        ("mobilenetv2.dw96s2", (8, 112, 112, 96), (96, 3, 3, 1), (8, 56, 56, 96)),
        ("deeplab.3x3d2", (4, 28, 28, 256), (256, 3, 3, 256), (4, 28, 28, 256)),
        ("unet.valid", (2, 140, 140, 64), (64, 3, 3, 64), (2, 138, 138, 64)),
    ],
)
def test_known_layers_have_the_shapes_of_their_papers(name: str, x: object, w: object, y: object) -> None:
    layer = next(layer for layer in workload(name.split(".")[0]) if layer.name == name)
    problem = layer.problem()
    assert (problem.x_shape, problem.w_shape, problem.y_shape) == (x, w, y)


def test_an_unknown_workload_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'there is no workload "resnet5", .*did you mean "resnet50"\?'):
        workload("resnet5")
    with pytest.raises(ValueError, match=r'there is no workload "", expected one of article, lenet5, [^?]*$'):
        workload("")


pairs = st.tuples(st.integers(1, 12), st.integers(1, 12))
zeros = st.integers(0, 12)
zero_and_more = zeros.flatmap(lambda left: st.tuples(st.just(left), st.integers(left + 1, 13)))  # so four numbers


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Layers whose sizes fit together."""
    kh, kw = draw(pairs)
    lh, lw = dilation = draw(pairs)
    groups = draw(st.integers(1, 5))
    size = st.integers(1, 300)
    return Layer(
        name="a name",
        n=draw(size),
        h=(kh - 1) * lh + draw(size),
        w=(kw - 1) * lw + draw(size),
        c=groups * draw(size),
        d=groups * draw(size),
        kh=kh,
        kw=kw,
        stride=draw(pairs),
        padding=draw(st.one_of(st.tuples(zeros, zeros), st.tuples(st.tuples(zeros, zeros), zero_and_more))),
        dilation=dilation,
        groups=groups,
    )


@given(layers())
def test_the_notation_round_trips(layer: Layer) -> None:
    assert parse_layer(layer.notation, "a name") == layer


@given(layers(), st.randoms(use_true_random=False))
def test_the_order_of_the_letters_is_free(layer: Layer, random: object) -> None:
    terms = re.findall(r"[a-z][0-9]+(?:x[0-9]+)*", layer.notation)
    random.shuffle(terms)  # type: ignore[attr-defined]
    assert parse_layer("".join(terms), "a name") == layer


@given(st.text(alphabet="nhwcdksplgx0123456789 -é٣", max_size=30))
def test_any_other_text_is_a_value_error(text: str) -> None:
    try:
        layer = parse_layer(text)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - some texts are the notation
    else:
        assert parse_layer(layer.notation, text) == layer


def test_what_is_left_out_has_its_usual_value() -> None:
    layer = parse_layer("n8h56w56c64d64k3s1p1")
    assert layer == Layer("n8h56w56c64d64k3s1p1", 8, 56, 56, 64, 64, 3, 3, padding=(1, 1))
    assert layer.notation == "n8h56w56c64d64k3p1"


def test_padding_takes_one_two_or_four_numbers() -> None:
    for text, padding, shortest in [
        ("p1", ((1, 1), (1, 1)), "p1"),
        ("p1x2", ((1, 1), (2, 2)), "p1x2"),
        ("p0x1x2x3", ((0, 1), (2, 3)), "p0x1x2x3"),
        ("p1x1x2x2", ((1, 1), (2, 2)), "p1x2"),
        ("p1x1x1x1", ((1, 1), (1, 1)), "p1"),
    ]:
        layer = parse_layer(f"n2h8w8c4d4k3{text}")
        assert layer.problem().padding == padding
        assert layer.notation == f"n2h8w8c4d4k3{shortest}"


@pytest.mark.parametrize(
    ("notation", "message"),
    [
        ("", '"n" is missing'),
        ("n8h56w56c64k3", '"d" is missing'),
        ("foo", '"foo" is not a letter with a number'),
        ("n8 h56", '" h56" is not a letter with a number'),
        ("n8h56w56c64d64k3x", '"x" is not a letter with a number'),
        ("n8h56w56c64d64k3q1", 'there is no letter "q"'),
        ("n8h56w56c64d64k3n8", '"n" comes twice'),
        ("n8x8h56w56c64d64k3", '"n" takes one number, not a pair'),
        ("n8h56w56c64d64k3x3x3", '"k" takes one number or a pair'),
        ("n8h56w56c64d64k3p1x2x3", '"p" takes one number, a pair or four'),
        ("n0h56w56c64d64k3", '"n" is 0, expected at least 1'),
        ("n8h56w56c64d64k3s1x0", '"s" is 0, expected at least 1'),
        ("n8h5w5c64d64k7", "the kernel spans 7 rows, but the padded input has only 5"),
        ("n8h56w56c64d64k3g3", "x has 64 channels, which 3 groups do not divide"),
        ("n8h56w56c64d65k3g2", "the convolution has 65 output channels, which 2 groups do not divide"),
        ("n8h9999999999w56c64d64k3", "a size of x is 9999999999, expected at most"),
    ],
)
def test_bad_notation_says_what_is_wrong(notation: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^layer ") as caught:
        parse_layer(notation)
    assert message in str(caught.value)
    assert notation in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_data_has_the_problems_shapes_and_dtype(dtype: type) -> None:
    problem = parse_layer("n3h9w8c6d4k3x2s2p1g2").problem(dtype)
    x, w, b, dy = make_data(problem)
    assert (x.shape, w.shape, b.shape, dy.shape) == (problem.x_shape, problem.w_shape, (4,), problem.y_shape)
    assert {array.dtype for array in (x, w, b, dy)} == {np.dtype(dtype)}


def test_data_is_standard_normal_and_follows_from_its_seed() -> None:
    problem = ConvProblem(n=8, h=64, w=64, c=8, d=8, kh=3, kw=3)
    x = make_data(problem).x
    deviation = 1 / np.sqrt(x.size)  # of a mean of so many; and of a standard deviation, smaller still
    assert abs(x.mean()) < 6 * deviation
    assert abs(x.std() - 1) < 6 * deviation
    np.testing.assert_array_equal(x, make_data(problem).x)
    assert not np.array_equal(x, make_data(problem, seed=1).x)
