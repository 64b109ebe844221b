"""How the arrays of a call lie: batched or in a smaller form, in two dimensions or one, with their axes in some order.

Behind the checks there are batched arrays alone, ``x (n, h, w, c)``, ``w (d, kh, kw, c / groups)`` and ``y (n, oh, ow,
d)``. A `Layout` turns the shapes that a caller's arrays have into these, and back. It does the same with the letters of
their axes, so every message names shapes as the caller sees them.

A smaller form leaves out axes of one: ``(H, W, C)`` is one image, ``(H, W)`` has one channel as well. One dimension
leaves out rows: ``(N, L, C)`` is ``(N, 1, L, C)``. Ranks are counted in two dimensions everywhere, with the rows.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

__all__ = ["IMAGES", "PLAIN", "WEIGHTS", "Form", "Layout"]

T = TypeVar("T")
Axes = tuple[T, ...]

#: The orders of axes that images may have, and that weights may have beside images with their channels last.
IMAGES = ("NHWC", "NCHW")
WEIGHTS = ("OHWI", "HWIO")


class Layout(NamedTuple):
    """The order of the axes of images and of weights, and the dimensions that are convolved.

    Attributes
    ----------
    images : str
        Of x, y and their gradients: "NHWC" or "NCHW".
    weights : str
        Of w and its gradient: "OHWI" or "HWIO", and "OIHW" beside "NCHW".
    dimensions : int
        Two, or one.
    """

    images: str = "NHWC"
    weights: str = "OHWI"
    dimensions: int = 2

    def rank(self, shape: Axes[T]) -> int:
        """Return how many axes there would be in two dimensions."""
        return len(shape) + 2 - self.dimensions

    # ------------------------------------------------------------------------------------------- images

    def batched_images(self, shape: Axes[int]) -> Axes[int]:
        """Return the shape of images as ``(n, h, w, c)``."""
        if self.images == "NCHW":
            if self.dimensions == 1:
                shape = *shape[:-1], 1, shape[-1]
            shape = *shape[:-3], *shape[-2:], shape[-3]
        elif self.dimensions == 1:
            shape = *shape[:-2], 1, *shape[-2:]
        return shape if len(shape) == 4 else (1, *shape) if len(shape) == 3 else (1, *shape, 1)

    def images_of(self, batched: Axes[T], rank: int) -> Axes[T]:
        """Return what is ``(n, h, w, c)`` as images of so many axes have it."""
        axes = batched if rank == 4 else batched[1:] if rank == 3 else batched[1:3]
        if self.images == "NCHW":
            axes = *axes[:-3], axes[-1], *axes[-3:-1]
            return axes if self.dimensions == 2 else (*axes[:-2], axes[-1])
        if self.dimensions == 2:
            return axes
        return (*axes[:-3], *axes[-2:]) if rank > 2 else axes[1:]

    # ------------------------------------------------------------------------------------------ weights

    def batched_weights(self, shape: Axes[int]) -> Axes[int]:
        """Return the shape of weights as ``(d, kh, kw, c / groups)``."""
        rank = self.rank(shape)
        if self.dimensions == 1:
            rows = -1 if self.weights == "OIHW" else -len(shape) if self.weights == "HWIO" and rank == 4 else -2
            shape = *shape[:rows], 1, *shape[rows:]
        if rank == 4 and self.weights != "OHWI":
            order = (3, 0, 1, 2) if self.weights == "HWIO" else (0, 2, 3, 1)
            return tuple(shape[i] for i in order)
        return shape if rank == 4 else (1, *shape) if rank == 3 else (1, *shape, 1)

    def weights_of(self, batched: Axes[T], rank: int) -> Axes[T]:
        """Return what is ``(d, kh, kw, c / groups)`` as weights of so many axes have it."""
        d, kh, kw, c = batched
        columns = (kh, kw) if self.dimensions == 2 else (kw,)
        if rank < 4:
            return (*columns, c) if rank == 3 else columns
        return {"OHWI": (d, *columns, c), "HWIO": (*columns, c, d), "OIHW": (d, c, *columns)}[self.weights]

    # ------------------------------------------------------------------------------------------ letters

    def letters(self, name: str, rank: int, transposed: bool = False) -> str:
        """Return the axes of an array as messages name them."""
        if name == "w":
            d, c = ("C", "D") if transposed else ("D", "C")
            kernel = ("KH", "KW") if self.dimensions == 2 else ("", "K")
            axes = self.weights_of((d, *kernel, f"{c}/groups" if rank == 4 else c), rank)
        else:
            out, channels = ("O", "D") if name in ("y", "dy") else ("", "C")
            axes = self.images_of(("N", f"{out}H", f"{out}{'WL'[2 - self.dimensions]}", channels), rank)
        return f"({', '.join(axes)})"

    @property
    def sizes(self) -> tuple[str, str]:
        """What the two sizes of an image are called."""
        return ("height", "width") if self.dimensions == 2 else ("height", "length")

    @property
    def lines(self) -> tuple[str, str]:
        """What kernels and images have along them."""
        return ("rows", "columns") if self.dimensions == 2 else ("rows", "positions")

    def __str__(self) -> str:
        images, weights = (
            (name if self.dimensions == 2 else name.replace("H", "")) for name in (self.images, self.weights)
        )
        return f"x and y {images}, w {weights}"


#: Batched or smaller, in two dimensions, channels last.
PLAIN = Layout()


class Form(NamedTuple):
    """The shapes that a caller's arrays have, in their layout.

    Attributes
    ----------
    x, w, y : tuple of int
        Of the convolution; a transposed one makes x of y.
    b : tuple of int
        The bias: of what comes out.
    layout : Layout
        How they lie.
    """

    x: Axes[int]
    w: Axes[int]
    y: Axes[int]
    b: Axes[int]
    layout: Layout = PLAIN
