"""Whole networks, stock against replaced, in float64: losses, all gradients, training; and what people do to models."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import pickletools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import nhwconv.torch
from models import MODELS, Same, Standardised, Unet, batch, build, gradients, train
from nhwconv import ops, planning
from nhwconv.torch import Conv2d, _engine, conv2d, replace_conv, replace_conv2d, restore_conv

CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the engine's functions as they are called."""
    seen: list[str] = []

    def watch(name: str) -> Any:
        function = getattr(_engine, name)

        def watched(*arguments: Any) -> Any:
            seen.append(name)
            return function(*arguments)

        return watched

    for name in ("forward", "backward"):
        monkeypatch.setattr(_engine, name, watch(name))
    return seen


def agree(got: Any, expected: Any) -> None:
    """Hold numbers of float64 to what rounding leaves of sums that are computed in another order."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_networks_compute_and_train_as_before(name: str, channels_last: bool, calls: list[str]) -> None:
    stock, ours = build(name, channels_last), build(name, channels_last)
    names = replace_conv(ours)
    # A layer with another border stays PyTorch's.
    convolutions = [n for n, m in stock.named_modules() if isinstance(m, CONVOLUTIONS)]
    assert sorted([*names, *names.left]) == sorted(convolutions)
    x, target = batch(channels_last=channels_last)
    for backwards in (1, 2):
        agree(gradients(ours, x, target, backwards), gradients(stock, x, target, backwards))
    assert {"forward", "backward"} <= set(calls)
    with torch.no_grad():
        agree(ours(x), stock(x))
    with torch.inference_mode():
        agree(ours.eval()(x), stock.eval()(x))
    np.testing.assert_allclose(train(ours.train(), x, target), train(stock.train(), x, target), rtol=1e-9)
    agree(dict(ours.named_parameters()), dict(stock.named_parameters()))
    assert restore_conv(ours) == names
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("name", MODELS)
def test_results_and_gradients_lie_in_memory_as_pytorchs(name: str) -> None:
    found = []
    for replace in (False, True):
        model = build(name, channels_last=True)
        if replace:
            replace_conv(model)
        strides: list[Any] = []
        for module in model.modules():
            if isinstance(module, CONVOLUTIONS):
                module.register_forward_hook(lambda _m, _a, y, strides=strides: strides.append(y.stride()))
        gradients(model, *batch(channels_last=True))
        found.append(strides)
        for parameter in model.parameters() if replace else ():
            assert parameter.grad is None or parameter.grad.stride() == parameter.stride()
    assert found[0] == found[1]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_networks_give_the_same(name: str) -> None:
    model = build(name)
    expected = gradients(model, *batch())
    replace_conv(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    agree({k.removeprefix("_orig_mod."): v for k, v in gradients(compiled, *batch()).items()}, expected)


@pytest.mark.parametrize("name", MODELS)
def test_exported_and_traced_networks_give_the_same(name: str) -> None:
    model = build(name).eval()
    x, _ = batch()
    y = model(x)
    names = replace_conv(model)
    exported = torch.export.export(model, (x,))
    agree(exported.module()(x), y)
    assert str(exported.graph).count("torch.ops.nhwconv.conv") >= len(names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of TorchScript as a whole
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # of an output_size, as PyTorch's layers do
        traced = torch.jit.trace(model, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    agree(loaded(2 * x), model(2 * x))
    assert str(loaded.inlined_graph).count("nhwconv::conv") >= len(names)


@pytest.mark.parametrize("name", ["InPlace", "Residual", "Grouped", "Dense", "Derived"])
def test_symbolic_traces_call_nhwconv(name: str) -> None:
    model = build(name).eval()
    if name in ("Derived", "Grouped"):  # these loop over a batch, or look at sizes
        model = nn.Sequential(*(m for m in model.children() if isinstance(m, nn.Conv2d)))[:2]
    x, _ = batch()
    y = model(x)
    names = replace_conv(model)
    graph = torch.fx.symbolic_trace(model)
    agree(graph(x), y)
    assert sum(node.target is conv2d for node in graph.graph.nodes) == len(names)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_counted_as_pytorchs(name: str) -> None:
    model = build(name)
    counts = []
    for change in (lambda _: None, replace_conv):
        change(model)
        with FlopCounterMode(display=False) as counter:
            gradients(model, *batch())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("copied", ["pickle", "torch.save", "deepcopy"])
def test_copies_are_replaced_layers(name: str, copied: str, calls: list[str]) -> None:
    model = build(name)
    replace_conv(model, strategy=("depthwise", "loop"))
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    x, target = batch()
    expected = gradients(model, x, target)
    number = len(calls)
    assert number > 0
    agree(gradients(other, x, target), expected)
    assert len(calls) == 2 * number
    strategies = [m.strategy for m in other.modules() if hasattr(m, "strategy")]
    assert strategies
    assert set(strategies) == {("depthwise", "loop")}


# ------------------------------------------------------------------------------------- what is replaced


def layer(**options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 6, 3, dtype=torch.float64, **options)


def images(n: int = 2) -> torch.Tensor:
    return batch(n)[0]


@pytest.mark.parametrize("first", ["parametrize", "replace"])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_layers(norm: str, first: str, calls: list[str]) -> None:
    parametrise = getattr(parametrizations, norm)
    model = nn.Sequential(layer()).eval()
    if first == "parametrize":
        parametrise(model[0])
        y = model(images())
        assert replace_conv(model) == ["0"]
    else:
        replace_conv(model)
        parametrise(model[0])
        y = nn.functional.conv2d(images(), model[0].weight, model[0].bias)
    agree(model(images()), y)
    agree(copy.deepcopy(model)(images()), y)
    assert calls
    model(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    other = copy.deepcopy(model)
    assert restore_conv(other) == ["0"]
    assert type(other[0]).__bases__ == (nn.Conv2d,)
    number = len(calls)
    agree(other(images()), y)
    assert len(calls) == number
    parametrize.remove_parametrizations(other[0], "weight")
    assert type(other[0]) is nn.Conv2d
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is Conv2d
    agree(model(images()), y)
    assert len(calls) == number + 1
    assert restore_conv(model) == ["0"]
    assert type(model[0]) is nn.Conv2d


def test_norms_by_hooks_and_pruning(calls: list[str]) -> None:
    model = nn.Sequential(layer(), layer(groups=3), layer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
        nn.utils.spectral_norm(model[1])
    prune.l1_unstructured(model[2], "weight", amount=0.3)
    model.eval()
    expected = [m(images()) for m in model]
    assert replace_conv(model) == ["0", "1", "2"]
    agree([m(images()) for m in model], expected)
    assert len(calls) == 3
    prune.remove(model[2], "weight")
    agree(model[2](images()), expected[2])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func scripts something of its own
@pytest.mark.parametrize("kind", [Same, Standardised])
def test_derived_layers_keep_their_own_code(kind: Any, calls: list[str]) -> None:
    stock = kind(3, 6, 3, dtype=torch.float64)
    ours = copy.deepcopy(stock)
    assert replace_conv2d(ours, strategy="loop") == [""]
    assert isinstance(ours, kind)
    assert repr(ours) == repr(stock)
    assert type(pickle.loads(pickle.dumps(ours))) is type(ours)
    x = images().requires_grad_()
    agree(torch.autograd.grad(ours(x).square().sum(), [x, *ours.parameters()]),
          torch.autograd.grad(stock(x).square().sum(), [x, *stock.parameters()]))  # fmt: skip
    assert calls == ["forward", "backward"]
    agree(torch.func.jacfwd(ours)(x), torch.func.jacfwd(stock)(x))
    assert restore_conv(ours) == [""]
    assert type(ours) is kind
    assert "strategy" not in vars(ours)


class OwnPickle(nn.Conv2d):
    def __reduce__(self) -> Any:
        return OwnPickle, (1, 1, 1)


def test_what_is_left_is_named_with_its_reason() -> None:
    model = nn.ModuleDict(
        {
            "border": nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
            "narrow": nn.Conv2d(1, 1, 3, dtype=torch.bfloat16),
            "nowhere": nn.Conv2d(1, 1, 3, device="meta"),
            "later": nn.LazyConv2d(1, 3),
            "own": OwnPickle(1, 1, 1),
            "fine": nn.Conv2d(1, 1, 3),
            "other": nn.Linear(1, 1),
        }
    )
    names = replace_conv(model)
    assert names == ["fine"]
    assert names.left == {
        "border": "padding_mode is 'circular'",
        "narrow": "its dtype is torch.bfloat16",
        "nowhere": "it is on meta",
        "later": "it is lazy: call the model once, then replace",
        "own": "OwnPickle pickles itself in its own way",
    }
    model["later"](torch.ones(1, 2, 5, 5))
    assert replace_conv(model) == ["later"]
    assert model["later"](torch.ones(1, 2, 5, 5)).shape == (1, 1, 3, 3)


def test_replace_conv2d_leaves_what_else_there_will_be() -> None:
    model = Unet()
    assert replace_conv2d(model) == ["down", "middle", "up"]
    assert type(model.rise) is nn.ConvTranspose2d


def test_unknown_strategies_are_refused_before_anything_is_changed() -> None:
    model = nn.Sequential(layer())
    for function in (lambda: replace_conv(model, strategy="looop"), lambda: Conv2d(1, 1, 1, strategy="looop"),
                     lambda: conv2d(images(), model[0].weight, strategy="looop")):  # fmt: skip
        with pytest.raises(ValueError, match="looop"):
            function()
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(ValueError, match="depthwise"):
        conv2d(images(), model[0].weight, strategy="depthwise")


def test_a_strategy_reaches_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[Any] = set()
    make_plan = planning.make_plan

    def watch(problem: Any, pass_: Any, chosen: Any, *form: Any) -> Any:
        if chosen != "auto":  # what shows whether nhwconv does a convolution at all
            asked.add((pass_, chosen))
        return make_plan(problem, pass_, chosen, *form)

    monkeypatch.setattr(planning, "make_plan", watch)
    for strategy in ("im2col", ("tensordot", "loop")):
        model = nn.Sequential(layer(), Standardised(6, 2, 3, dtype=torch.float64))
        replace_conv(model, strategy=strategy)
        expected = {(pass_, strategy) for pass_ in ("forward", "weight_grad", "input_grad")}
        ops.forget_plans()
        model(images().requires_grad_()).sum().backward()
        assert asked == expected
        asked.clear()
        ops.forget_plans()
        torch._dynamo.reset()
        torch.compile(model, backend="aot_eager")(images().requires_grad_()).sum().backward()
        assert asked == expected
        asked.clear()


# ------------------------------------------------------------------------------------ what is done to models


def quantisable() -> nn.Sequential:
    import torch.ao.quantization as quantization

    torch.manual_seed(0)
    return nn.Sequential(
        quantization.QuantStub(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), quantization.DeQuantStub()
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("training", [False, True])
def test_quantisation_finds_its_layers(training: bool) -> None:
    import torch.ao.quantization as quantization

    engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"
    results = []
    for replace in (False, True):
        model = quantisable().train(training)
        if replace:
            assert replace_conv(model) == ["1"]
        if training:
            model.qconfig = quantization.get_default_qat_qconfig(engine)
            prepared = quantization.prepare_qat(model)
        else:
            model.qconfig = quantization.get_default_qconfig(engine)
            prepared = quantization.prepare(model)
        prepared(images().float())
        names = replace_conv(prepared)
        assert not names
        assert list(names.left) == ["1"]
        results.append([type(prepared[1]), type(quantization.convert(prepared.eval())[1])])
    assert results[0] == results[1]
    assert results[0][1] is torch.ao.nn.quantized.Conv2d


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("names", [["1", "2", "3"], ["1", "2"]])
def test_layers_are_fused_for_quantisation(names: list[str], training: bool) -> None:
    import torch.ao.quantization as quantization

    results = []
    for replace in (False, True):
        model = quantisable().train(training)
        if replace:
            assert replace_conv(model) == ["1"]
        fuse = quantization.fuse_modules_qat if training else quantization.fuse_modules
        fused = fuse(model, [names])
        results.append(([type(layer) for layer in fused.modules()], fused(images().float())))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_graphs_are_prepared_for_quantisation_first_and_layers_then_left_alone() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = images().float()
    quantised = []
    for prepared_first in (True, False):
        model = normalised().float()
        if not prepared_first:
            assert replace_conv(model) == ["0", "3"]
        prepared = prepare_fx(model, get_default_qconfig_mapping(), (x,))
        if prepared_first:
            names = replace_conv(prepared)
            assert not names
            assert set(names.left.values()) == {"it is prepared for quantisation"}
        prepared(x)
        modules = convert_fx(prepared).modules()
        quantised.append(sum(isinstance(m, torch.ao.nn.quantized.Conv2d) for m in modules))
    assert quantised == [2, 0]


def normalised() -> nn.Sequential:
    """Return convolutions with normalisations that have seen images."""
    model = nn.Sequential(
        layer(bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU()
    ).double()
    with torch.no_grad():
        model(images(8))
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_normalisations_are_fused_first_and_layers_replaced_then(calls: list[str]) -> None:
    from torch.fx.experimental import optimization

    expected = normalised()(images())
    fused = optimization.fuse(normalised())
    assert replace_conv(fused) == ["0", "3"]
    agree(fused(images()), expected)
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert calls == ["forward", "forward"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_graphs_of_replaced_layers_have_none_to_fuse_and_compute_the_same() -> None:
    from torch.fx.experimental import optimization

    model = normalised()
    expected = model(images())
    replace_conv(model)
    fused = optimization.fuse(model)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == 2
    agree(fused(images()), expected)


def test_a_replaced_layer_is_fused_with_its_normalisation(calls: list[str]) -> None:
    model = normalised()
    expected = model[:2](images())
    replace_conv(model, strategy="loop")
    fused = nn.utils.fuse_conv_bn_eval(model[0], model[1])
    assert (type(fused), fused.strategy) == (Conv2d, "loop")
    agree(fused(images()), expected)
    assert calls == ["forward"]


def test_averaged_models() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = nn.Sequential(layer())
    replace_conv(model)
    for averaged in (AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))):
        averaged.update_parameters(model)
        averaged.update_parameters(model)
        assert type(averaged.module[0]) is Conv2d
        agree(averaged(images()), model(images()))


def test_dtypes_change_with_the_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nhwconv.torch")
    model = nn.Sequential(layer(padding=1))
    replace_conv(model)
    for dtype in (torch.float32, torch.float16, torch.float64, torch.bfloat16):
        assert model.to(dtype)(images().to(dtype)).dtype is dtype
        assert bool(caplog.records) == (dtype is torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_is_pytorchs(dtype: torch.dtype) -> None:
    model = nn.Sequential(layer(padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1)).float()
    found = []
    for change in (lambda _: None, replace_conv):
        change(model)
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            y = model(images().float())
        y.sum().backward()
        found.append([y, *(p.grad for p in model.parameters())])
    assert found[0][0].dtype is dtype
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_hooks(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(layer(padding=1), nn.ReLU(), nn.Conv2d(6, 2, 3, dtype=torch.float64))
    expected = gradients(lambda_model(model), *batch())["input"]
    replace_conv(model)
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    x = images(4).requires_grad_()
    y = checkpoint(model, x, use_reentrant=reentrant)
    nn.functional.cross_entropy(y.mean((2, 3)), batch()[1] % 2).backward()
    assert seen == ["before", "after", "before", "after", "backward"]
    assert expected.shape == x.grad.shape
    agree(x.grad, torch.autograd.grad(nn.functional.cross_entropy(model(x).mean((2, 3)), batch()[1] % 2), x)[0])


def lambda_model(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_models() -> None:
    for options in ({"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}, {"padding": (1, 2), "groups": 3}):
        ours = Conv2d(3, 6, 3, dtype=torch.float64, **options)
        scripted = torch.jit.script(ours)
        for x in (images(), images()[0]):
            agree(scripted(x), nn.Conv2d.forward(ours, x))
        assert "nhwconv::conv2d" in str(scripted._conv_forward.inlined_graph)
    model = nn.Sequential(Standardised(3, 6, 3))
    replace_conv(model)
    with pytest.raises(NotImplementedError, match=r"Standardised runs its own code.*restore_conv"):
        torch.jit.script(model)


def test_stateless_calls_over_an_ensemble() -> None:
    model = nn.Sequential(layer(), nn.ReLU(), nn.Conv2d(6, 2, 1, dtype=torch.float64))
    replace_conv(model)
    others = [copy.deepcopy(model) for _ in range(3)]
    for i, other in enumerate(others):
        other[0].weight.data += i
    parameters, buffers = torch.func.stack_module_state(others)
    y = torch.vmap(lambda p, b, x: torch.func.functional_call(model, (p, b), (x,)), (0, 0, None))(
        parameters, buffers, images()
    )
    agree(y, torch.stack([other(images()) for other in others]))


def test_profiles_name_the_convolution_and_its_shapes() -> None:
    from torch.profiler import ProfilerActivity, profile

    model = nn.Sequential(layer())
    replace_conv(model)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        model(images().requires_grad_()).sum().backward()
    shapes = {e.name: e.input_shapes for e in found.events() if e.name.startswith("nhwconv::")}
    x, w, y = [2, 3, 12, 12], [6, 3, 3, 3], [2, 6, 10, 10]
    assert shapes == {"nhwconv::conv2d": [x, w, [6]], "nhwconv::conv2d_backward": [y, x, w]}


def test_expanded_weights_know_the_convolution() -> None:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    model = nn.Sequential(layer(), nn.ReLU(), nn.Conv2d(6, 2, 1, dtype=torch.float64))
    found = []
    for change in (lambda _: None, replace_conv):
        change(model)
        for p in model.parameters():
            p.grad_sample = None
        call_for_per_sample_grads(model, loss_reduction="sum")(images()).square().sum().backward()
        found.append([p.grad_sample for p in model.parameters()])
    agree(found[1], found[0])


def test_public_names() -> None:
    assert all(hasattr(nhwconv.torch, name) for name in nhwconv.torch.__all__)


def test_pickles_and_graphs_hold_public_names_alone() -> None:
    model = nn.Sequential(layer(), Standardised(6, 2, 1))
    replace_conv(model)
    assert type(model[0]).__module__ == conv2d.__module__ == "nhwconv.torch"
    text = pickletools_names(pickle.dumps(model))
    assert not [name for name in text if name.startswith("nhwconv") and "._" in name]
    assert "nhwconv_torch_conv2d(" in torch.fx.symbolic_trace(model[0]).code


def pickletools_names(data: bytes) -> list[str]:
    return [str(argument) for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
