"""What the benchmarks share: layers, strategies, and the calls that are timed.

asv runs these files against the package of older commits, too, and knows a combination of parameters by its place in
their lists. So the lists are written out here, whatever a commit has, and what a commit lacks is found out in `setup`,
where a `NotImplementedError` has asv skip it.
"""

import importlib
import os

#: Everything, where this variable is set; otherwise few enough combinations for a minute or two.
WHOLE = bool(os.environ.get("NHWCONV_BENCH_WHOLE"))

PASSES = ["forward", "weight_grad", "input_grad"]

#: A dense layer, a depthwise one, a small one, one of few pixels, a pointwise one, a strided one, and one of eight
#: channels a group, as notation since older commits have no name for it: they differ in what limits them.
LAYERS = [
    "resnet50.3.3x3", "mobilenetv2.dw144", "lenet5.2", "resnet50.4.3x3", "mobilenetv2.pw24", "resnet50.3.3x3s2",
    "n8h28w28c256d256k3p1g32",
]  # fmt: skip
STRATEGIES = ["auto", "loop"]
DTYPES = ["float32"]
THREADS = [1, 2]
if WHOLE:
    LAYERS += [
        "resnet50.stem", "resnet50.2.3x3", "resnet50.2.1x1b", "resnet50.5.3x3", "resnet50.5.1x1",
        "vgg16.2_2", "alexnet.2", "cifar.32-32", "mobilenetv2.stem", "mobilenetv2.dw96s2",
        "convnext.dw7x7", "unet.valid", "deeplab.3x3d2",
    ]  # fmt: skip
    STRATEGIES += ["winograd", "depthwise", "im2col"]
    DTYPES += ["float64"]


class Calls:
    """The passes of one layer, as a user calls them, on so many threads."""

    def __init__(self, name, strategy, dtype="float32", threads=None, passes=PASSES):
        import nhwconv  # without it nothing can be measured, which is no reason to skip

        try:
            from nhwconv.strategies import REGISTRY
            from nhwconv.workloads import make_data, parse_layer, workload
        except ImportError:
            raise NotImplementedError from None
        limit_threads(threads)
        network, known_by_name, _ = name.partition(".")
        known = workload(network) if known_by_name else [parse_layer(name)]
        layer = next((layer for layer in known if layer.name == name), None)
        if layer is None or strategy not in (*REGISTRY, "auto"):
            raise NotImplementedError
        self.problem = layer.problem(dtype)
        if strategy != "auto" and any(REGISTRY[strategy].supports(self.problem, pass_) for pass_ in passes):
            raise NotImplementedError
        self.package = nhwconv
        self.x, self.w, self.b, self.dy = make_data(self.problem)
        self.kernel_size, self.input_size = self.w.shape[1:3], self.x.shape[1:3]
        self.options = {**layer.options, "strategy": strategy}

    def forward(self):
        return self.package.conv2d(self.x, self.w, self.b, **self.options)

    def weight_grad(self):
        return self.package.conv2d_weight_grad(self.x, self.dy, self.kernel_size, **self.options)

    def input_grad(self):
        return self.package.conv2d_input_grad(self.dy, self.w, self.input_size, **self.options)

    def backward(self):
        return self.package.conv2d_backward(self.x, self.w, self.dy, **self.options)


def limit_threads(threads):
    """Compute with so many threads, all where that is None; a machine without so many is skipped."""
    import numba

    if threads is None:
        return
    if threads > numba.config.NUMBA_NUM_THREADS:
        raise NotImplementedError
    numba.set_num_threads(threads)


def roofline():
    """Return the module that measures this machine, which older commits keep elsewhere."""
    for folder in ("cli", "compare"):
        try:
            return importlib.import_module(f"nhwconv.{folder}.roofline")
        except ImportError:
            continue
    raise NotImplementedError
