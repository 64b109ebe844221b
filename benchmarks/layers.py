"""The passes on layers of real networks, by strategy, dtype and number of threads."""

from .common import DTYPES, LAYERS, PASSES, STRATEGIES, THREADS, Calls, roofline


class Time:
    params = (LAYERS, STRATEGIES, DTYPES, THREADS)
    param_names = ("layer", "strategy", "dtype", "threads")
    timeout = 120

    def setup(self, *parameters):
        self.calls = Calls(*parameters)
        # What is compiled or loaded is so now, and in no timing.
        for pass_ in (*PASSES, "backward"):
            getattr(self.calls, pass_)()

    def time_forward(self, *parameters):
        self.calls.forward()

    def time_weight_grad(self, *parameters):
        self.calls.weight_grad()

    def time_input_grad(self, *parameters):
        self.calls.input_grad()

    def time_backward(self, *parameters):
        self.calls.backward()


class Track:
    """What is not a time: lower is better throughout."""

    params = (LAYERS, PASSES, STRATEGIES, DTYPES)
    param_names = ("layer", "pass", "strategy", "dtype")
    timeout = 120

    def setup(self, layer, pass_, strategy, dtype):
        self.calls = Calls(layer, strategy, dtype, passes=[pass_])
        self.call = getattr(self.calls, pass_)
        self.call()

    def track_roofline(self, layer, pass_, strategy, dtype):
        """How many times as long as the roofline's time a call takes."""
        measure = roofline().measure
        from nhwconv.timing import low, time_calls

        return low(time_calls(self.call, 0.2)) / measure(self.calls.problem.dtype).seconds(self.calls.problem)

    track_roofline.unit = "times the roofline's time"
    #: As in `kernels`: the series goes on, though the roofline has moved to another module.
    track_roofline.version = "3baba57ba99c77c6e919a5ffb490db06c98bc2214248362efb5dfaaa3729c852"

    def track_error(self, layer, pass_, strategy, dtype):
        """The l2 error, relative, against the reference in float64."""
        import numpy as np

        exact = Calls(layer, "tensordot", "float64", passes=[pass_])
        for name in ("x", "w", "b", "dy"):
            setattr(exact, name, getattr(self.calls, name).astype(np.float64))
        expected = getattr(exact, pass_)()
        return float(np.linalg.norm(self.call() - expected) / np.linalg.norm(expected))

    track_error.unit = "l2, relative"

    def track_workspace(self, layer, pass_, strategy, dtype):
        """Extra memory of a call by its plan."""
        c = self.calls
        return c.package.plan(pass_, c.x.shape, c.w.shape, dtype=dtype, **c.options).workspace

    track_workspace.unit = "bytes"


class Memory:
    """The most memory of a process that imports the package and calls each pass once."""

    params = LAYERS
    param_names = ("layer",)
    timeout = 120

    def setup(self, layer):
        self.calls = Calls(layer, "auto")

    def peakmem_passes(self, layer):
        self.calls.forward()
        self.calls.backward()
