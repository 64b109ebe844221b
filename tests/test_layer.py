"""Conv2D, the article's layer: parameters, forward, backward, what it keeps and what it refuses."""

import copy
import itertools
import pickle
import re

import ml_dtypes
import numpy as np
import pytest

import nhwconv as nc
from cases import DTYPES

OPTIONS = {"stride": (2, 1), "padding": ((1, 0), (2, 1)), "dilation": (1, 2), "groups": 2}
X = np.random.default_rng(0).standard_normal((3, 9, 8, 4))


def test_parameters():
    """W has the article's shape and He's deviation, b starts at zero, both in the layer's dtype."""
    layer = nc.Conv2D(64, 96, (3, 5), rng=0)
    assert layer.W.shape == (96, 3, 5, 64)
    assert layer.b.shape == (96,)
    assert layer.W.dtype == layer.b.dtype == np.float32
    assert not layer.b.any()
    count, deviation = layer.W.size, np.sqrt(2 / (3 * 5 * 64))
    # Five standard errors of a normal sample's deviation and mean.
    assert abs(layer.W.std() / deviation - 1) < 5 / np.sqrt(2 * count)
    assert abs(layer.W.mean()) < 5 * deviation / np.sqrt(count)
    assert layer.gradW is None
    assert layer.gradb is None


def test_groups_reduce_the_fan_in():
    """With groups a kernel sees fewer channels, and its weights start larger."""
    layer = nc.Conv2D(64, 64, 3, groups=64, rng=0)
    assert layer.W.shape == (64, 3, 3, 1)
    assert abs(layer.W.std() / np.sqrt(2 / 9) - 1) < 5 / np.sqrt(2 * layer.W.size)


def test_rng():
    """A seed and a generator of that seed give the same weights; another seed gives others, and so does none."""
    weights = [nc.Conv2D(3, 4, 3, rng=rng).W for rng in (7, np.random.default_rng(7), 8, None, None)]
    np.testing.assert_array_equal(weights[0], weights[1])
    for i in range(1, 5):
        for j in range(i):
            assert (i, j) == (1, 0) or (weights[i] != weights[j]).any()


def test_an_advanced_generator_is_used_as_it_is():
    """Two layers that share a generator do not start alike."""
    rng = np.random.default_rng(0)
    assert (nc.Conv2D(3, 4, 3, rng=rng).W != nc.Conv2D(3, 4, 3, rng=rng).W).any()


@pytest.mark.parametrize("dtype", [*DTYPES, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all"])
def test_forward_and_backward_are_the_functions(options, dtype):
    """forward is conv2d with W and b; backward sets gradW and gradb and returns dx, as conv2d_backward does."""
    x = X.astype(dtype)
    layer = nc.Conv2D(4, 6, 3, **options, dtype=dtype, rng=0)
    layer.b[...] = np.arange(6)
    y = layer.forward(x)
    np.testing.assert_array_equal(y, nc.conv2d(x, layer.W, layer.b, **options))
    eta = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
    dx = layer.backward(eta)
    g = nc.conv2d_backward(x, layer.W, eta, **options)
    for got, expected in ((dx, g.dx), (layer.gradW, g.dw), (layer.gradb, g.db)):
        np.testing.assert_array_equal(got, expected, strict=True)


def test_first_layer_skips_the_input_gradient():
    """needs_input_grad=False: backward returns None, and the other gradients are as always."""
    first, inner = (nc.Conv2D(4, 6, 3, rng=0, dtype=float, needs_input_grad=needs) for needs in (False, True))
    eta = np.ones_like(first.forward(X))
    inner.forward(X)
    assert first.backward(eta) is None
    assert inner.backward(eta).shape == X.shape
    np.testing.assert_array_equal(first.gradW, inner.gradW)
    np.testing.assert_array_equal(first.gradb, inner.gradb)


def test_without_bias():
    """bias=False: no b, no gradb."""
    layer = nc.Conv2D(4, 6, 3, bias=False, dtype=float, rng=0)
    y = layer.forward(X)
    np.testing.assert_array_equal(y, nc.conv2d(X, layer.W))
    layer.backward(np.ones_like(y))
    assert layer.b is None
    assert layer.gradb is None
    assert layer.gradW.shape == layer.W.shape


def test_gradients_are_of_the_last_call():
    """A second backward overwrites, and does not add; the arrays of the first stay as they were."""
    layer = nc.Conv2D(4, 6, 3, dtype=float, rng=0)
    eta = np.ones_like(layer.forward(X))
    layer.backward(eta)
    first, kept = layer.gradW, layer.gradW.copy()
    layer.backward(2 * eta)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_allclose(layer.gradW, 2 * first, rtol=1e-12)


def test_training_reduces_the_loss():
    """A few steps against the gradient fit a layer to another's output: parameters can be updated in place."""
    teacher, pupil = (
        nc.Conv2D(4, 2, 3, padding="same", dtype=float, rng=1),
        nc.Conv2D(4, 2, 3, padding="same", dtype=float, rng=2),
    )
    teacher.b[...] = 1, -1
    target, losses = teacher.forward(X), []
    for _ in range(50):
        error = pupil.forward(X) - target
        losses.append(float(np.mean(error**2)))
        pupil.backward(2 * error / error[..., 0].size)
        pupil.W -= 0.05 * pupil.gradW
        pupil.b -= 0.05 * pupil.gradb
    assert losses[-1] < losses[0] / 100
    assert all(b < a for a, b in itertools.pairwise(losses))


def test_strategy_is_used():
    """The layer passes its strategy on."""
    layer = nc.Conv2D(4, 6, 3, strategy="tensordot", rng=0)
    np.testing.assert_array_equal(layer.forward(X), nc.conv2d(X, layer.W, layer.b, strategy="tensordot"))
    assert layer.options["strategy"] == "tensordot"


def test_backward_needs_forward():
    """backward without an input says what to do."""
    with pytest.raises(RuntimeError, match=re.escape("Conv2D.backward: call forward first")):
        nc.Conv2D(4, 6, 3).backward(np.ones((3, 7, 6, 6)))


def test_errors_of_a_call_leave_the_layer_as_it_was():
    """A bad x or eta raises, and the layer still knows its last good input and gradients."""
    layer = nc.Conv2D(4, 6, 3, dtype=float, rng=0)
    eta = np.ones_like(layer.forward(X))
    layer.backward(eta)
    gradients = layer.gradW, layer.gradb
    with pytest.raises(ValueError, match="w has 4 input channels per group, but x has 5 channels in 1 group"):
        layer.forward(np.ones((3, 9, 8, 5)))
    with pytest.raises(ValueError, match="dy has shape"):
        layer.backward(eta[:, 1:])
    assert layer.gradW is gradients[0]
    assert layer.gradb is gradients[1]
    assert layer.backward(eta).shape == X.shape


def test_array_likes_and_the_form_without_a_batch():
    """Lists are arrays, and (H, W, C) is one image."""
    layer = nc.Conv2D(4, 6, 3, dtype=float, rng=0)
    y = layer.forward(X[0].tolist())
    np.testing.assert_array_equal(y, nc.conv2d(X[0], layer.W, layer.b))
    assert layer.backward(np.ones_like(y)).shape == X[0].shape


def test_repr():
    """A layer shows what it was made of."""
    assert repr(nc.Conv2D(3, 16, 5)) == "Conv2D(3, 16, (5, 5))"


LAYERS = (
    (nc.Conv2D, (3, 9, 8, 4), {"stride": (2, 1), "padding": "same", "groups": 2}, nc.conv2d, nc.conv2d_backward),
    (nc.Conv2DTranspose, (3, 9, 8, 4), {"stride": 2, "padding": ((1, 0), (1, 1)), "output_padding": (1, 0)},
     nc.conv_transpose2d, nc.conv_transpose2d_backward),
    (nc.Conv1D, (3, 30, 4), {"stride": 2, "padding": (1, 3), "dilation": 2}, nc.conv1d, nc.conv1d_backward),
    (nc.Conv1DTranspose, (3, 30, 4), {"stride": 3, "padding": 1, "output_padding": 2, "groups": 2},
     nc.conv_transpose1d, nc.conv_transpose1d_backward),
)  # fmt: skip
each_layer = pytest.mark.parametrize(("kind", "shape", "options", "forward", "backward"), LAYERS)


@each_layer
@pytest.mark.parametrize("layouts", [{}, {"w_layout": "HWIO"}, {"layout": "NCHW"}], ids=["usual", "HWIO", "NCHW"])
def test_each_layer_is_its_functions(kind, shape, options, forward, backward, layouts):
    """Every layer calls the functions of its name with its weights, in every layout, and starts alike in all."""
    x = np.random.default_rng(0).standard_normal(shape)
    x = np.moveaxis(x, -1, 1) if layouts.get("layout") else x
    layer = kind(4, 6, 3, **options, **layouts, dtype=float, rng=0)
    layer.b[...] = np.arange(6)
    y = layer.forward(x)
    np.testing.assert_array_equal(y, forward(x, layer.W, layer.b, **options, **layouts))
    usual = kind(4, 6, 3, **options, dtype=float, rng=0)
    np.testing.assert_array_equal(np.sort(layer.W, None), np.sort(usual.W, None))
    usual.b[...] = layer.b
    of_usual = usual.forward(np.moveaxis(x, 1, -1) if layouts.get("layout") else x)
    np.testing.assert_array_equal(np.moveaxis(y, 1, -1) if layouts.get("layout") else y, of_usual)
    dx = layer.backward(y)
    g = backward(x, layer.W, y, **options, **layouts)
    for got, expected in zip((dx, layer.gradW, layer.gradb), g, strict=True):
        np.testing.assert_array_equal(got, expected)
    size = "(3, 3)" if len(shape) == 4 else "3"
    assert repr(layer) == f"{kind.__name__}(4, 6, {size})"
    with pytest.raises(RuntimeError, match=f"{kind.__name__}.backward: call forward first"):
        kind(4, 6, 3).backward(y)
    with pytest.raises(TypeError, match=f"^{kind.__name__}: in_channels is 1.5, expected an integer"):
        kind(1.5, 6, 3)
    assert "must not change before `backward`" in kind.__doc__


@each_layer
def test_layers_pickle_without_their_batch(kind, shape, options, forward, backward):
    """What is stored or copied is the model, not what it saw last; and it works."""
    layer = kind(4, 6, 3, **options, rng=0)
    small = len(pickle.dumps(layer))
    x = np.ones((50, *shape[1:]), np.float32)
    y = layer.forward(x)
    layer.backward(y)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert again._x is None
        np.testing.assert_array_equal(again.gradW, layer.gradW)
        np.testing.assert_array_equal(again.forward(x), y)
    assert len(pickle.dumps(layer)) < small + layer.gradW.nbytes + 1000
    assert layer.backward(y).shape == x.shape  # the layer itself still knows


def test_initial_weights_of_a_transposed_layer():
    """They keep the size of numbers: an output meets as many weights as the stride leaves of the kernel."""
    layer = nc.Conv2DTranspose(64, 48, 4, stride=2, rng=0)
    assert layer.W.shape == (64, 4, 4, 48)
    assert abs(layer.W.std() / np.sqrt(2 / (64 * 4)) - 1) < 5 / np.sqrt(2 * layer.W.size)
