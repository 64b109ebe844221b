"""Suites that nobody here wrote, run with nhwconv in the place of their convolutions: by ``make test-peers`` alone.

A module's `NOT_APPLICABLE` names cases that ask for something else, each with the reason. They are run, and have to
fail: one that passes, and one that is no longer there, fail the run.
"""

from __future__ import annotations

import os
from collections import defaultdict

os.environ.setdefault("KERAS_BACKEND", "torch")

import pytest

import nhwconv.torch  # noqa: F401 - before the first convolution of PyTorch's


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_module = defaultdict(list)
    for item in items:
        by_module[item.getparent(pytest.Module)].append(item)
    for module, cases in by_module.items():
        left = dict(getattr(module.obj, "NOT_APPLICABLE", {}))
        for item in cases:
            reason = left.pop(item.name, None)
            if reason is not None:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        if left and not any("::" in argument for argument in config.args):
            raise pytest.UsageError(f"{module.name}: there is no case {', '.join(left)}")


#: What suites skip by themselves: PyTorch cannot do it either.
_SKIPPED_BY_THEM = ("`output_padding` greater than `strides`", "`output_padding` must be less than `strides`")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [] if reporter is None else reporter.stats.get("skipped", [])
    known = tuple(f"Skipped: {reason}" for reason in _SKIPPED_BY_THEM)
    if any(not report.longrepr[2].startswith(known) for report in skipped):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
