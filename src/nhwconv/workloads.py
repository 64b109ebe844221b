"""Convolution layers of real networks, and a short notation for any layer.

The notation writes a letter before each number: ``n8h56w56c64d64k3s1p1`` is a batch of 8 images of 56 x 56 pixels and
64 channels, convolved with 64 kernels of 3 x 3, stride 1, padding 1.

======  ================  ==================
letter  stands for        where it is absent
======  ================  ==================
``n``   images            needed
``h``   rows of x         needed
``w``   columns of x      needed
``c``   channels of x     needed
``d``   channels of y     needed
``k``   kernel            needed
``s``   stride            1
``p``   padding           0
``l``   dilation          1
``g``   groups            1
======  ================  ==================

``k``, ``s``, ``p`` and ``l`` take a pair for rows and columns: ``k3x5`` is a kernel of 3 rows and 5 columns. ``p`` also
takes four numbers, for top, bottom, left and right: ``p0x1x0x1``. The order of the letters is free. ``g`` equal to
``c`` is a depthwise convolution.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from . import checks
from .names import known
from .problem import ConvProblem, Padding

__all__ = ["WORKLOADS", "Data", "Layer", "make_data", "notation", "parse_layer", "workload"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """One convolution layer with a name.

    Attributes
    ----------
    name : str
        What tables call it, such as "resnet50.2.3x3".
    n, h, w, c : int
        The shape of x: images, rows, columns, channels.
    d, kh, kw : int
        Output channels, and the kernel's rows and columns.
    stride, dilation : tuple of int
        For rows and columns.
    padding : tuple
        For rows and columns, or ``((top, bottom), (left, right))``.
    groups : int
        Groups of channels.
    """

    name: str
    n: int
    h: int
    w: int
    c: int
    d: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | Padding = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def problem(self, dtype: npt.DTypeLike = np.float32) -> ConvProblem:
        """Return the layer as a checked `ConvProblem`.

        Raises
        ------
        ValueError
            Where the sizes do not fit together.
        """
        with checks.words_of(f"layer {self.name}"):
            options = checks.Options.of(self.stride, self.padding, self.dilation, self.groups)
            x = checks.as_shape("a size of x", (self.n, self.h, self.w, self.c))
            w = checks.as_shape("a size of w", (self.d, self.kh, self.kw, self.c // self.groups))
            if self.c % self.groups:  # here, because w's shape above hides it
                checks.fail(f"x has {self.c} channels, which {self.groups} groups do not divide")
            return checks.problem_for(x, w, options, np.dtype(dtype))

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for the public functions: stride, padding, dilation and groups."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def notation(self) -> str:
        """The layer in the notation that `parse_layer` reads; what has its usual value is left out."""
        return notation(self.problem())


def notation(problem: ConvProblem) -> str:
    """Return a problem in the notation that `parse_layer` reads; what has its usual value is left out.

    Parameters
    ----------
    problem : ConvProblem
        The convolution. Its dtype is not part of the notation.

    Returns
    -------
    str

    Examples
    --------
    >>> from nhwconv.workloads import notation, parse_layer
    >>> notation(parse_layer("n8h57w57c64d128k3s2p0x1x0x1").problem())
    'n8h57w57c64d128k3s2p0x1x0x1'
    """
    p = problem
    text = f"n{p.n}h{p.h}w{p.w}c{p.c}d{p.d}k{_numbers(p.kh, p.kw)}"
    for letter, value, usual in (("s", p.stride, 1), ("p", _shortest(p.padding), 0), ("l", p.dilation, 1)):
        text += f"{letter}{_numbers(*value)}" if set(value) != {usual} else ""
    return text + (f"g{p.groups}" if p.groups != 1 else "")


def _shortest(padding: Padding) -> tuple[int, ...]:
    """Return two numbers where both sides are padded alike, otherwise four."""
    (top, bottom), (left, right) = padding
    return (top, left) if (top, left) == (bottom, right) else (top, bottom, left, right)


def _numbers(*values: int) -> str:
    return f"{values[0]}" if len(values) == 2 and len(set(values)) == 1 else "x".join(map(str, values))


# ------------------------------------------------------------------------------------------- notation

#: No array of a layer has more elements than this: a slip of the pen is told before anything is multiplied with it.
LARGEST = 10**12

_TERM = re.compile(r"([a-z])([0-9]{1,10}(?:x[0-9]{1,10})*)")
_NEEDED = "nhwcdk"
#: How many numbers a letter takes: all others one.
_COUNTS = {"k": (1, 2), "s": (1, 2), "l": (1, 2), "p": (1, 2, 4)}
_ALLOWED = {(1,): "one number, not a pair", (1, 2): "one number or a pair", (1, 2, 4): "one number, a pair or four"}
_USUAL = {"s": (1,), "p": (0,), "l": (1,), "g": (1,)}


def parse_layer(notation: str, name: str | None = None) -> Layer:
    """Return the layer that a notation such as ``n8h56w56c64d64k3s1p1`` describes.

    Parameters
    ----------
    notation : str
        Letters and numbers, as this module's first lines list them.
    name : str, optional
        The layer's name; the notation itself where it is not given.

    Returns
    -------
    Layer

    Raises
    ------
    ValueError
        Where the text is not the notation, or its sizes do not fit together.

    Examples
    --------
    >>> from nhwconv.workloads import parse_layer
    >>> layer = parse_layer("n8h56w56c64d128k3x5s2p1x2")
    >>> layer.kh, layer.kw, layer.padding
    (3, 5, (1, 2))
    >>> layer.problem().y_shape
    (8, 28, 28, 128)
    """
    terms = _terms(notation)
    for letter in _NEEDED:
        if letter not in terms:
            _refuse(notation, f'"{letter}" is missing')
    sizes = {letter: terms.get(letter) or _USUAL[letter] for letter in _NEEDED + "splg"}
    for letter, values in sizes.items():
        if min(values) < 1 and letter != "p":
            _refuse(notation, f'"{letter}" is {min(values)}, expected at least 1')
    n, h, w, c, d, groups = (sizes[letter][0] for letter in "nhwcdg")
    (kh, kw), stride, dilation = (_pair(sizes[letter]) for letter in "ksl")
    layer = Layer(name or notation, n, h, w, c, d, kh, kw, stride, _padding(sizes["p"]), dilation, groups)
    problem = layer.problem()
    elements = max(math.prod(shape) for shape in (problem.x_shape, problem.w_shape, problem.y_shape))
    if elements > LARGEST:
        _refuse(notation, f"an array would have {elements:.1e} elements, expected at most {LARGEST:.1e}")
    return layer


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns; one number stands for both."""
    return values[0], values[-1]


def _padding(values: tuple[int, ...]) -> tuple[int, int] | Padding:
    if len(values) < 4:
        return _pair(values)
    top, bottom, left, right = values
    return (top, left) if (top, left) == (bottom, right) else ((top, bottom), (left, right))


def _terms(notation: str) -> dict[str, tuple[int, ...]]:
    """Return each letter's numbers."""
    terms: dict[str, tuple[int, ...]] = {}
    end = 0
    while end < len(notation):
        match = _TERM.match(notation, end)
        if match is None:
            _refuse(notation, f'"{notation[end:]}" is not a letter with a number')
        letter, numbers = match[1], tuple(map(int, match[2].split("x")))
        if letter not in _NEEDED and letter not in _USUAL:
            _refuse(notation, f'there is no letter "{letter}"')
        if letter in terms:
            _refuse(notation, f'"{letter}" comes twice')
        counts = _COUNTS.get(letter, (1,))
        if len(numbers) not in counts:
            _refuse(notation, f'"{letter}" takes {_ALLOWED[counts]}')
        terms[letter] = numbers
        end = match.end()
    return terms


def _refuse(notation: str, why: str) -> NoReturn:
    raise ValueError(f'layer "{notation}": {why}; expected a form like n8h56w56c64d64k3s1p1')


# ------------------------------------------------------------------------------------------- networks

#: Each network's layers by their names within it. Batches are sized for a CPU: a layer takes milliseconds.
_NETWORKS: dict[str, dict[str, str]] = {
    "article": {
        "4x4": "n1h4w4c1d1k2",
    },
    "lenet5": {  # LeCun et al. 1998
        "1": "n64h28w28c1d6k5",
        "2": "n64h12w12c6d16k5",
    },
    "cifar": {  # the first layers of a small network on 32 x 32 images
        "3-32": "n64h32w32c3d32k3p1",
        "32-32": "n64h32w32c32d32k3p1",
    },
    "alexnet": {  # Krizhevsky et al. 2012
        "1": "n8h227w227c3d96k11s4",
        "2": "n8h27w27c96d256k5p2",
    },
    "vgg16": {  # Simonyan and Zisserman 2014
        "1_1": "n2h224w224c3d64k3p1",
        "1_2": "n2h224w224c64d64k3p1",
        "2_2": "n2h112w112c128d128k3p1",
        "3_2": "n2h56w56c256d256k3p1",
        "4_2": "n2h28w28c512d512k3p1",
    },
    "resnet50": {  # He et al. 2015, with the stride in the 3x3
        "stem": "n8h224w224c3d64k7s2p3",
        "2.1x1a": "n8h56w56c256d64k1",
        "2.3x3": "n8h56w56c64d64k3p1",
        "2.1x1b": "n8h56w56c64d256k1",
        "3.3x3s2": "n8h56w56c128d128k3s2p1",
        "3.proj": "n8h56w56c256d512k1s2",
        "3.3x3": "n8h28w28c128d128k3p1",
        "3.1x1": "n8h28w28c512d128k1",
        "4.3x3": "n8h14w14c256d256k3p1",
        "4.1x1": "n8h14w14c1024d256k1",
        "5.3x3": "n8h7w7c512d512k3p1",
        "5.1x1": "n8h7w7c2048d512k1",
    },
    "mobilenetv2": {  # Sandler et al. 2018
        "stem": "n8h224w224c3d32k3s2p1",
        "dw96s2": "n8h112w112c96d96k3s2p1g96",
        "dw144": "n8h56w56c144d144k3p1g144",
        "dw384": "n8h14w14c384d384k3p1g384",
        "pw24": "n8h56w56c24d144k1",
        "dw32": "n8h112w112c32d32k3p1g32",
        "dw576": "n8h14w14c576d576k3p1g576",
        "dw960": "n8h7w7c960d960k3p1g960",
    },
    "resnext50": {  # Xie et al. 2017: 32 groups
        "2.3x3g32": "n8h56w56c128d128k3p1g32",
        "3.3x3s2g32": "n8h56w56c256d256k3s2p1g32",
        "3.3x3g32": "n8h28w28c256d256k3p1g32",
        "4.3x3g32": "n8h14w14c512d512k3p1g32",
        "5.3x3g32": "n8h7w7c1024d1024k3p1g32",
    },
    "regnet": {  # Radosavovic et al. 2020: 8 channels a group, 24 channels a group
        "8x13": "n8h28w28c104d104k3p1g13",
        "8x26s2": "n8h28w28c208d208k3s2p1g26",
        "24x6": "n8h28w28c144d144k3p1g6",
    },
    "shufflenet": {  # Zhang et al. 2018
        "1x1g3": "n8h28w28c240d240k1g3",
    },
    "efficientnet": {  # Tan and Le 2019: EfficientNet-B0
        "dw96s2": "n8h112w112c96d96k3s2p1g96",
        "dw5x5-144s2": "n8h56w56c144d144k5s2p2g144",
        "dw5x5-240": "n8h28w28c240d240k5p2g240",
        "dw5x5-672": "n8h14w14c672d672k5p2g672",
        "pw240": "n8h28w28c40d240k1",
        "se480": "n8h1w1c480d20k1",
    },
    "convnext": {  # Liu et al. 2022
        "stem4x4": "n8h224w224c3d96k4s4",
        "dw7x7": "n8h56w56c96d96k7p3g96",
        "down2x2": "n8h28w28c192d384k2s2",
    },
    "vit": {  # Dosovitskiy et al. 2021: images cut into patches
        "patch14": "n4h224w224c3d384k14s14",
        "patch16": "n8h224w224c3d768k16s16",
        "patch32": "n8h224w224c3d768k32s32",
    },
    "unet": {  # Ronneberger et al. 2015: without padding
        "valid": "n2h140w140c64d64k3",
    },
    "deeplab": {  # Chen et al. 2017: dilated
        "3x3d2": "n4h28w28c256d256k3p2l2",
    },
}

#: The names that `workload` knows.
WORKLOADS: tuple[str, ...] = tuple(_NETWORKS)


@lru_cache
def workload(name: str) -> tuple[Layer, ...]:
    """Return the layers of a network, named ``network.layer``.

    Parameters
    ----------
    name : str
        One of `WORKLOADS`.

    Returns
    -------
    tuple of Layer

    Raises
    ------
    ValueError
        Where there is no such workload; the message suggests the nearest name.

    Examples
    --------
    >>> from nhwconv.workloads import workload
    >>> [layer.name for layer in workload("lenet5")]
    ['lenet5.1', 'lenet5.2']
    """
    layers = _NETWORKS[known("workload", name, WORKLOADS)]
    return tuple(parse_layer(notation, f"{name}.{layer}") for layer, notation in layers.items())


# ----------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    """Arrays for one problem: x, w, b and dy in the shapes that it has."""

    x: Array
    w: Array
    b: Array
    dy: Array


def make_data(problem: ConvProblem, seed: int = 0) -> Data:
    """Return standard-normal arrays for a problem, in its dtype; the same seed gives the same arrays.

    Parameters
    ----------
    problem : ConvProblem
        The convolution.
    seed : int
        Of NumPy's default generator.

    Returns
    -------
    Data
        x ``(n, h, w, c)``, w ``(d, kh, kw, c / groups)``, b ``(d,)``, dy ``(n, oh, ow, d)``.

    Raises
    ------
    MemoryError
        Where there is no room for them.

    Examples
    --------
    >>> from nhwconv.workloads import make_data, parse_layer
    >>> make_data(parse_layer("n2h8w8c3d4k3").problem()).dy.shape
    (2, 6, 6, 4)
    """
    rng = np.random.default_rng(seed)
    drawn: Any = problem.compute_dtype  # half types are drawn in float32, then rounded
    shapes = (problem.x_shape, problem.w_shape, (problem.d,), problem.y_shape)
    return Data(*(rng.standard_normal(shape, drawn).astype(problem.dtype, copy=False) for shape in shapes))
