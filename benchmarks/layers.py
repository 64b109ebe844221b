"""The three passes on layers of real networks, once for each strategy."""

from .common import LAYERS, STRATEGIES, Calls


class _Pass:
    params = (LAYERS, STRATEGIES)
    param_names = ("layer", "strategy")
    timeout = 120

    def setup(self, layer, strategy):
        self.call = getattr(Calls(layer, strategy, [self.pass_]), self.pass_)
        self.call()  # what is compiled or loaded is so now, and in no timing


class Forward(_Pass):
    pass_ = "forward"

    def time_forward(self, layer, strategy):
        self.call()


class WeightGrad(_Pass):
    pass_ = "weight_grad"

    def time_weight_grad(self, layer, strategy):
        self.call()


class InputGrad(_Pass):
    pass_ = "input_grad"

    def time_input_grad(self, layer, strategy):
        self.call()
