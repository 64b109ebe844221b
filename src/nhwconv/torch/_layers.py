"""Layers as in `torch.nn`, and the convolutions of a model made nhwconv's and PyTorch's again.

A layer keeps its identity, parameters and hooks: only its class changes, as `torch.nn.utils.parametrize` does it. What
becomes of a class is a row of `_TABLE`; what becomes of a class that is derived from one there is `_routed`.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.ao.quantization.fuser_method_mappings import _DEFAULT_OP_LIST_TO_FUSER_METHOD as _FUSIONS
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from . import _engine
from ._function import conv1d, conv2d, conv_transpose1d, conv_transpose2d
from ._options import KINDS, check_strategy

_log = logging.getLogger("nhwconv.torch")


class _OnNhwconv:
    """What layers that run on nhwconv have in common."""

    strategy = cast("Any", "auto")  # as in `conv2d`; TorchScript reads annotations, and knows no unions of these
    __jit_unused_properties__ = ("qconfig",)

    def __init__(self, *arguments: Any, strategy: str | tuple[str, ...] = "auto", **options: Any) -> None:
        check_strategy(strategy, type(self).__name__)
        super().__init__(*arguments, **options)
        self.strategy = strategy

    @property
    def qconfig(self) -> Any:
        """How to quantise this layer, which makes it PyTorch's again: quantisation knows layers by their class."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        if value is not None:
            _restore(self)
        self.__dict__["qconfig"] = value


class _Convolution(_OnNhwconv):
    """What a convolution's forward pass comes to, in Python and in TorchScript, which knows operators alone.

    In TorchScript ``self`` is the scripted layer, which is of no class here.
    """

    _function: Any

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.jit.is_scripting():
            return self._scripted(input, weight, bias)
        else:  # noqa: RET505 - TorchScript compiles what is after an if, and skips an else
            return self._compute(input, weight, bias)

    def _compute(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            if not torch.compiler.is_compiling():
                _log.debug("padding_mode is %r: PyTorch's own convolution runs", self.padding_mode)
            y: Tensor = super()._conv_forward(input, weight, bias)  # type: ignore[misc]
            return y
        options = self.stride, self.padding, self.dilation, self.groups
        computed: Tensor = self._function(input, weight, bias, *options, strategy=self.strategy)
        return computed


class Conv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` on `nhwconv.torch.conv1d`: the same arguments, parameters and ``state_dict``.

    Parameters
    ----------
    *arguments, **options
        As in `torch.nn.Conv1d`.
    strategy : str or tuple of str
        As in `conv2d`.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> layer = nhwconv.torch.Conv1d(3, 16, 5, padding="same")
    >>> layer(torch.ones(8, 3, 100)).shape
    torch.Size([8, 16, 100])
    """

    _function = staticmethod(conv1d)

    def _scripted(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sequences = input if input.dim() == 3 else input[None]
        before, behind = 0, 0
        if self.padding_mode == "zeros":
            before, behind = self._reversed_padding_repeated_twice
        else:
            sequences = functional.pad(sequences, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        y = torch.ops.nhwconv.conv1d(
            sequences, weight, bias, self.stride, [before, behind], self.dilation, self.groups, self.strategy
        )
        return y if input.dim() == 3 else y[0]


class Conv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` on `nhwconv.torch.conv2d`: the same arguments, parameters and ``state_dict``.

    Padding modes other than "zeros" are left to PyTorch. ``.to(memory_format=torch.channels_last)`` on the model saves
    a conversion of the weights at each call.

    Parameters
    ----------
    *arguments, **options
        As in `torch.nn.Conv2d`.
    strategy : str or tuple of str
        As in `conv2d`.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> layer = nhwconv.torch.Conv2d(3, 16, 3, padding="same")
    >>> layer(torch.ones(8, 3, 28, 28)).shape
    torch.Size([8, 16, 28, 28])
    """

    _function = staticmethod(conv2d)

    def _scripted(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        images = input if input.dim() == 4 else input[None]
        left, right, top, bottom = 0, 0, 0, 0
        if self.padding_mode == "zeros":
            left, right, top, bottom = self._reversed_padding_repeated_twice
        else:
            images = functional.pad(images, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        y = torch.ops.nhwconv.conv2d(
            images, weight, bias, self.stride, [top, bottom, left, right], self.dilation, self.groups, self.strategy
        )
        return y if input.dim() == 4 else y[0]


class _Transposed(_OnNhwconv):
    """The same for transposed convolutions, which PyTorch writes without a `_conv_forward`."""

    _function: Any

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, self.weight.dim() - 2, self.dilation
        )
        if torch.jit.is_scripting():
            return self._scripted(input, output_padding)
        else:  # noqa: RET505 - as above
            return self._compute(input, output_padding)

    def _compute(self: Any, input: Tensor, output_padding: list[int]) -> Tensor:
        # While torch.jit.trace watches, sizes that follow from an output_size are tensors.
        padding = tuple(int(p) if isinstance(p, Tensor) else p for p in output_padding)
        options = self.stride, self.padding, padding, self.groups, self.dilation
        y: Tensor = self._function(input, self.weight, self.bias, *options, strategy=self.strategy)
        return y


class ConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on `nhwconv.torch.conv_transpose1d`: the same arguments and ``state_dict``.

    Parameters
    ----------
    *arguments, **options
        As in `torch.nn.ConvTranspose1d`.
    strategy : str or tuple of str
        As in `conv2d`.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> layer = nhwconv.torch.ConvTranspose1d(16, 3, 4, stride=2, padding=1)
    >>> layer(torch.ones(8, 16, 100)).shape
    torch.Size([8, 3, 200])
    """

    _function = staticmethod(conv_transpose1d)

    def _scripted(self, input: Tensor, output_padding: list[int]) -> Tensor:
        sequences = input if input.dim() == 3 else input[None]
        y = torch.ops.nhwconv.conv_transpose1d(
            sequences, self.weight, self.bias, self.stride, self._reversed_padding_repeated_twice, self.dilation,
            self.groups, output_padding, self.strategy,
        )  # fmt: skip
        return y if input.dim() == 3 else y[0]


class ConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on `nhwconv.torch.conv_transpose2d`: the same arguments and ``state_dict``.

    Parameters
    ----------
    *arguments, **options
        As in `torch.nn.ConvTranspose2d`.
    strategy : str or tuple of str
        As in `conv2d`.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> layer = nhwconv.torch.ConvTranspose2d(16, 3, 3, stride=2, padding=1)
    >>> layer(torch.ones(8, 16, 14, 14), output_size=(28, 28)).shape
    torch.Size([8, 3, 28, 28])
    """

    _function = staticmethod(conv_transpose2d)

    def _scripted(self, input: Tensor, output_padding: list[int]) -> Tensor:
        images = input if input.dim() == 4 else input[None]
        left, right, top, bottom = self._reversed_padding_repeated_twice
        y = torch.ops.nhwconv.conv_transpose2d(
            images, self.weight, self.bias, self.stride, [top, bottom, left, right], self.dilation, self.groups,
            output_padding, self.strategy,
        )  # fmt: skip
        return y if input.dim() == 4 else y[0]


#: Which class becomes which. A function of PyTorch's and the one that takes its place in layers of derived classes.
_TABLE: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, ours.__name__): ours for ours in (Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d)
}
_FUNCTIONS = {kind.own: kind.public for kind in KINDS.values()}
_ORIGINAL = {new: old for old, new in _TABLE.items()}


# --------------------------------------------------------------------------------------- derived classes
# A class that is derived from PyTorch's layer changes its weights, pads its input, or does anything else, and calls
# PyTorch's function in the end, from wherever and under whatever name. Its own code runs, unchanged, while that
# function is ours. Both compute the same of all arguments, so this is right whatever the class does.


class _Route(TorchFunctionMode):
    """While this is on, convolutions of PyTorch's are nhwconv's."""

    def __init__(self, strategy: str | tuple[str, ...]) -> None:
        super().__init__()
        self.strategy = strategy

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = _FUNCTIONS.get(function)
        if ours is None:
            return function(*args, **(kwargs or {}))
        return ours(*args, strategy=self.strategy, **(kwargs or {}))


class _Routed(_OnNhwconv):
    """Mixed into a derived class, routes what its forward pass calls."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        with _Route(self.strategy):
            return super().forward(*arguments, **options)  # type: ignore[misc]

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"torch.jit.script: {type(self).__qualname__} runs its own code with nhwconv's convolution in it, which "
            "cannot be compiled; call nhwconv.torch.restore_conv(model) first"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here and has no place where pickle would find it.
        return _new_routed, (_restored(type(self)),), self.__dict__


@cache
def _routed(derived: Any) -> Any:
    own = {"__module__": derived.__module__, "__qualname__": derived.__qualname__, "__doc__": derived.__doc__}
    return type(derived.__name__, (_Routed, derived), own)


def _new_routed(derived: Any) -> nn.Module:
    routed = _routed(derived)
    layer: nn.Module = routed.__new__(routed)
    return layer


# --------------------------------------------------------------------------------------- changing classes


def _replaced(old: Any) -> Any:
    return _TABLE.get(old) or _routed(old)


def _restored(new: Any) -> Any:
    return _ORIGINAL.get(new) or new.__bases__[1]


def _own_class(layer: nn.Module) -> Any:
    """Return a layer's class, without the one that a parametrisation puts before it."""
    return parametrize.type_before_parametrizations(layer)


def _change_class(layer: Any, new: type[nn.Module]) -> None:
    """Give a layer this class; a parametrisation's own, which has the parametrised tensors, is made anew over it."""
    if parametrize.is_parametrized(layer):
        own = {k: v for k, v in vars(type(layer)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        new = type(type(layer).__name__, (new,), own)
    layer.__class__ = new


def _restore(layer: Any) -> None:
    """Make a layer PyTorch's again."""
    _change_class(layer, _restored(_own_class(layer)))
    layer.__dict__.pop("strategy", None)


def _of_restored(fuse: Any) -> Any:
    """Return what fuses a layer and those behind it for quantisation, which knows layers by their class."""

    def fuse_restored(is_qat: bool, layer: nn.Module, *behind: nn.Module) -> Any:
        _restore(layer)
        return fuse(is_qat, layer, *behind)

    return fuse_restored


for _kinds, _fuse in tuple(_FUSIONS.items()):
    if _kinds[0] in _TABLE:
        _FUSIONS[_TABLE[_kinds[0]], *_kinds[1:]] = _of_restored(_fuse)


class Replaced(list[str]):
    """The names of the layers that were changed, as in ``model.named_modules()``.

    Attributes
    ----------
    left : dict of str to str
        The names of the convolutions that were left to PyTorch, and why.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, str] = {}


def replace_conv(model: nn.Module, *, strategy: str | tuple[str, ...] = "auto") -> Replaced:
    """Let the convolutions of a model run on nhwconv, in place: one- and two-dimensional ones, transposed ones too.

    A layer keeps its identity, parameters and hooks: only its class changes. Layers of classes that are derived from
    PyTorch's keep what their own code does, whose convolutions then are nhwconv's. Left as they are: layers that are
    not on the CPU, have another dtype or another padding mode than "zeros", and such as are prepared for quantisation.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it may be a layer itself.
    strategy : str or tuple of str
        As in `conv2d`.

    Returns
    -------
    Replaced
        A list of the names of the layers that were changed, whose ``left`` says which were not and why.

    Raises
    ------
    ValueError, TypeError
        Where there is no such strategy.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 4, 3, padding_mode="reflect"))
    >>> names = nhwconv.torch.replace_conv(model)
    >>> names
    ['0']
    >>> names.left
    {'1': "padding_mode is 'reflect'"}
    >>> nhwconv.torch.restore_conv(model)
    ['0']
    """
    return _change(model, tuple(_TABLE), strategy)


def restore_conv(model: nn.Module) -> Replaced:
    """Undo `replace_conv`: make all of a model's layers that run on nhwconv PyTorch's, in place.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Returns
    -------
    Replaced
        A list of the names of the layers that were changed.
    """
    return _change(model, tuple(_TABLE), None)


def replace_conv2d(model: nn.Module, *, strategy: str | tuple[str, ...] = "auto") -> Replaced:
    """Do what `replace_conv` does to the model's `torch.nn.Conv2d` alone.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it may be a layer itself.
    strategy : str or tuple of str
        As in `conv2d`.

    Returns
    -------
    Replaced
        A list of the names of the layers that were changed, whose ``left`` says which were not and why.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU())
    >>> nhwconv.torch.replace_conv2d(model)
    ['0']
    >>> nhwconv.torch.restore_conv2d(model)
    ['0']
    """
    return _change(model, (nn.Conv2d,), strategy)


def restore_conv2d(model: nn.Module) -> Replaced:
    """Undo `replace_conv2d`: make the model's two-dimensional convolutions that run on nhwconv PyTorch's, in place.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Returns
    -------
    Replaced
        A list of the names of the layers that were changed.
    """
    return _change(model, (nn.Conv2d,), None)


def _change(model: nn.Module, kinds: tuple[Any, ...], strategy: str | tuple[str, ...] | None) -> Replaced:
    """Let layers of these kinds run on nhwconv with this strategy, or, without one, on PyTorch again."""
    ours = strategy is not None
    if ours:
        check_strategy(strategy)
    changed = Replaced()
    named: Any = model.named_modules()
    for name, layer in named:
        if not isinstance(layer, kinds) or isinstance(layer, _OnNhwconv) is ours:
            continue
        reason = _why_not(layer) if ours else None
        if reason is not None:
            changed.left[name] = reason
            continue
        if ours:
            _change_class(layer, _replaced(_own_class(layer)))
            layer.strategy = strategy
        else:
            _restore(layer)
        changed.append(name)
    return changed


def _why_not(layer: Any) -> str | None:
    """Return why a convolution is left to PyTorch; None if it isn't."""
    cls = _own_class(layer)
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: call the model once, then replace"
    if cls.__module__.startswith("torch.") and cls not in _TABLE:
        return f"PyTorch knows {cls.__module__}.{cls.__qualname__} by its class"
    if getattr(layer, "qconfig", None) is not None:
        return "it is prepared for quantisation"
    if any(method in vars(base) for base in cls.__mro__[:-1] for method in ("__reduce__", "__reduce_ex__")):
        return f"{cls.__qualname__} pickles itself in its own way"
    if layer.padding_mode != "zeros" and cls in _TABLE:
        return f"padding_mode is {layer.padding_mode!r}"
    weight = layer.weight
    if weight.device.type != "cpu":
        return f"it is on {weight.device}"
    if weight.dtype not in _engine.DTYPES:
        return f"its dtype is {weight.dtype}"
    return None
