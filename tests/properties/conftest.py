"""Threading layers that are not installed are skipped."""

import pytest

import threaded


@pytest.fixture(autouse=True)
def _skip_absent_layers(request):
    layer = request.node.callspec.params.get("layer") if hasattr(request.node, "callspec") else None
    if layer == "tbb" and threaded.find_tbb() is None:
        pytest.skip("tbb is not installed")
    if layer == "omp":
        pytest.importorskip("numba.np.ufunc.omppool", exc_type=ImportError)
