"""The convolutions of whole networks, as a training step calls them: each call has arrays of its own, found in memory.

All results of a step live until its end, as they do in a network; what lies between convolutions is left out.
"""

from .common import THREADS, limit_threads

#: Images in a batch.
IMAGES = 8

#: By network: rows and columns, channels, kernels, kernel size, stride, padding, groups, and how often it occurs.
#: Written out, as in `common`: older commits do not know them.
NETWORKS = {
    "resnet18": [
        (224, 3, 64, 7, 2, 3, 1, 1), (56, 64, 64, 3, 1, 1, 1, 4), (56, 64, 128, 1, 2, 0, 1, 1),
        (56, 64, 128, 3, 2, 1, 1, 1), (28, 128, 128, 3, 1, 1, 1, 3), (28, 128, 256, 1, 2, 0, 1, 1),
        (28, 128, 256, 3, 2, 1, 1, 1), (14, 256, 256, 3, 1, 1, 1, 3), (14, 256, 512, 1, 2, 0, 1, 1),
        (14, 256, 512, 3, 2, 1, 1, 1), (7, 512, 512, 3, 1, 1, 1, 3),
    ],
    "mobilenetv2": [
        (224, 3, 32, 3, 2, 1, 1, 1), (112, 32, 32, 3, 1, 1, 32, 1), (112, 32, 16, 1, 1, 0, 1, 1),
        (112, 16, 96, 1, 1, 0, 1, 1), (112, 96, 96, 3, 2, 1, 96, 1), (56, 96, 24, 1, 1, 0, 1, 1),
        (56, 24, 144, 1, 1, 0, 1, 2), (56, 144, 144, 3, 1, 1, 144, 1), (56, 144, 24, 1, 1, 0, 1, 1),
        (56, 144, 144, 3, 2, 1, 144, 1), (28, 144, 32, 1, 1, 0, 1, 1), (28, 32, 192, 1, 1, 0, 1, 3),
        (28, 192, 192, 3, 1, 1, 192, 2), (28, 192, 32, 1, 1, 0, 1, 2), (28, 192, 192, 3, 2, 1, 192, 1),
        (14, 192, 64, 1, 1, 0, 1, 1), (14, 64, 384, 1, 1, 0, 1, 4), (14, 384, 384, 3, 1, 1, 384, 4),
        (14, 384, 64, 1, 1, 0, 1, 3), (14, 384, 96, 1, 1, 0, 1, 1), (14, 96, 576, 1, 1, 0, 1, 3),
        (14, 576, 576, 3, 1, 1, 576, 2), (14, 576, 96, 1, 1, 0, 1, 2), (14, 576, 576, 3, 2, 1, 576, 1),
        (7, 576, 160, 1, 1, 0, 1, 1), (7, 160, 960, 1, 1, 0, 1, 3), (7, 960, 960, 3, 1, 1, 960, 3),
        (7, 960, 160, 1, 1, 0, 1, 2), (7, 960, 320, 1, 1, 0, 1, 1), (7, 320, 1280, 1, 1, 0, 1, 1),
    ],
    "convnext": [
        (224, 3, 96, 4, 4, 0, 1, 1), (56, 96, 96, 7, 1, 3, 96, 3), (56, 96, 192, 2, 2, 0, 1, 1),
        (28, 192, 192, 7, 1, 3, 192, 3), (28, 192, 384, 2, 2, 0, 1, 1), (14, 384, 384, 7, 1, 3, 384, 9),
        (14, 384, 768, 2, 2, 0, 1, 1), (7, 768, 768, 7, 1, 3, 768, 3),
    ],
}  # fmt: skip


class _Convolution:
    """One of a network's convolutions, with arrays of its own."""

    def __init__(self, rng, first, size, c, d, k, stride, padding, groups):
        import numpy as np

        def normal(*shape):
            return rng.standard_normal(shape, dtype=np.float32)

        out = (size + 2 * padding - k) // stride + 1
        self.x, self.w, self.b = normal(IMAGES, size, size, c), normal(d, k, k, c // groups), normal(d)
        self.dy = normal(IMAGES, out, out, d)
        self.needs = ("dw", "db") if first else ("dx", "dw", "db")
        self.options = {"stride": stride, "padding": padding, "groups": groups}

    def forward(self, package):
        return package.conv2d(self.x, self.w, self.b, **self.options)

    def backward(self, package):
        return package.conv2d_backward(self.x, self.w, self.dy, needs=self.needs, **self.options)


class _Step:
    """A training step's convolutions."""

    def prepare(self, network, threads):
        import numpy as np

        import nhwconv

        limit_threads(threads)
        rng = np.random.default_rng(0)
        self.package, self.convolutions = nhwconv, []
        for *sizes, count in NETWORKS[network]:
            for _ in range(count):
                self.convolutions.append(_Convolution(rng, not self.convolutions, *sizes))

    def forward(self):
        return [convolution.forward(self.package) for convolution in self.convolutions]

    def backward(self):
        return [convolution.backward(self.package) for convolution in reversed(self.convolutions)]


class Cold(_Step):
    params = (list(NETWORKS), THREADS)
    param_names = ("network", "threads")
    timeout = 300

    def setup(self, network, threads):
        self.prepare(network, threads)
        self.forward()
        self.backward()

    def time_forward(self, network, threads):
        self.forward()

    def time_backward(self, network, threads):
        self.backward()


class Memory(_Step):
    """The most memory of a process that makes one step, its arrays included."""

    params = list(NETWORKS)
    param_names = ("network",)
    timeout = 300

    def setup(self, network):
        self.prepare(network, None)

    def peakmem_step(self, network):
        results = self.forward()
        results += self.backward()
