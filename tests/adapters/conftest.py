"""What needs PyTorch, JAX or Dask: run by ``make test-adapters`` alone, where nothing may be skipped."""

from __future__ import annotations

import pytest

from nhwconv.torch import _left


@pytest.fixture(autouse=True)
def _nothing_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with PyTorch is nhwconv's: small single images, too, which are left to PyTorch otherwise."""
    monkeypatch.setattr(_left, "PIXELS", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
