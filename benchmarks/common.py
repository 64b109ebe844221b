"""What the benchmarks share: layers, strategies, and the calls that are timed."""

from nhwconv import conv2d, conv2d_input_grad, conv2d_weight_grad
from nhwconv.problem import PASSES
from nhwconv.strategies import REGISTRY
from nhwconv.workloads import make_data, workload

#: An early layer, a late one, a depthwise one, a small one: they differ in what limits them.
LAYERS = ["resnet50.2.3x3", "resnet50.4.3x3", "mobilenetv2.dw144", "lenet5.2"]

#: Every strategy but the reference, which is not meant to be fast.
STRATEGIES = [name for name in REGISTRY if name != "tensordot"]


def skip_unless_able(strategy, problem, passes=PASSES):
    """Have asv skip what cannot be run.

    It runs every combination of layer and strategy, and takes the names from one commit for all: a strategy may be
    unable to do a pass, or not exist yet.
    """
    if strategy not in REGISTRY or any(REGISTRY[strategy].supports(problem, pass_) for pass_ in passes):
        raise NotImplementedError


class Calls:
    """The three passes of one layer, as a user calls them."""

    def __init__(self, name, strategy, passes=PASSES):
        layer = next(layer for layer in workload(name.split(".")[0]) if layer.name == name)
        problem = layer.problem()
        skip_unless_able(strategy, problem, passes)
        self.x, self.w, self.b, self.dy = make_data(problem)
        self.kernel_size, self.input_size = self.w.shape[1:3], self.x.shape[1:3]
        self.options = {**layer.options, "strategy": strategy}

    def forward(self):
        conv2d(self.x, self.w, self.b, **self.options)

    def weight_grad(self):
        conv2d_weight_grad(self.x, self.dy, self.kernel_size, **self.options)

    def input_grad(self):
        conv2d_input_grad(self.dy, self.w, self.input_size, **self.options)
