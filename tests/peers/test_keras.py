"""Keras's tests of its layers, over PyTorch with nhwconv's convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from keras.src.layers.convolutional.conv_test import ConvBasicTest, ConvCorrectnessTest
from keras.src.layers.convolutional.conv_transpose_test import ConvTransposeBasicTest, ConvTransposeCorrectnessTest
from keras.src.layers.convolutional.depthwise_conv_test import DepthwiseConvBasicTest, DepthwiseConvCorrectnessTest
from keras.src.layers.convolutional.separable_conv_test import SeparableConvBasicTest, SeparableConvCorrectnessTest

import replaced

__all__ = [
    "ConvBasicTest",
    "ConvCorrectnessTest",
    "ConvTransposeBasicTest",
    "ConvTransposeCorrectnessTest",
    "DepthwiseConvBasicTest",
    "DepthwiseConvCorrectnessTest",
    "SeparableConvBasicTest",
    "SeparableConvCorrectnessTest",
]

NOT_APPLICABLE: dict[str, str] = {}


@pytest.fixture(autouse=True)
def nhwconvs_functions() -> Iterator[None]:
    with replaced.functions():
        yield
