"""Mutants: the package with one chosen mistake each, and the tests that ought to notice it.

    python tests/support/mutate.py                 # all of them, about a quarter of an hour on two cores
    python tests/support/mutate.py --only border   # those whose names have this in them

Each mutant is a copy of the package in a folder of its own, with a kernel cache of its own where it changes kernels. A
mutant that the named tests let pass is a survivor: the tests lack something. The exit code is the number of survivors.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "nhwconv"


class Mutant(NamedTuple):
    """A mistake: in `file` the text `old`, which must be there exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest


GRID = "tests/test_strategies.py -k 'test_grid and float32 and {}'".format
GUARDS = "tests/test_guard_pages.py -k memory"
THREADS = "tests/test_threads.py -k "
CACHE = "tests/test_kernel_cache.py -k "
FAULTS = "tests/test_faults.py -k "

MUTANTS = (
    # ------------------------------------------------------------------ kernels: sums, borders, strides, tails
    Mutant("tile: tail dropped", "kernels/tile.py", 'tail = builder.sub(value["columns"], i64((self.v - 1) *',
           'tail = builder.sub(value["columns"], i64(1 + (self.v - 1) *', GRID("loop and forward")),
    Mutant("tile: tail too long", "kernels/tile.py", 'tail = builder.sub(value["columns"], i64((self.v - 1) *',
           'tail = builder.sub(value["columns"], i64(-1 + (self.v - 1) *', GUARDS),
    Mutant("tile: every vector starts from the first one's bias", "kernels/tile.py",
           "first = emit.load(builder.gep(self.e, [i64(j * emit.lanes)]), mask)",
           "first = emit.load(builder.gep(self.e, [i64(0)]), mask)",
           "tests/test_strategies.py -k 'bias_is_added and loop'"),
    Mutant("tile: a sum starts from what it continues", "kernels/tile.py",
           'one_row = builder.icmp_signed("==", value["e_m"], i64(0))',
           'one_row = builder.icmp_signed("==", value["e_m"], value["e_m"])', "tests/test_long_sums.py"),
    Mutant("correlate: stride of rows", "kernels/correlate.py", "a_q = a_0 + (p - p_0) * down * pitch",
           "a_q = a_0 + (p - p_0) * pitch", GRID("loop and forward")),
    Mutant("correlate: a row past the border", "kernels/correlate.py", "if 0 <= source < g.h:",
           "if 0 <= source <= g.h:", GUARDS),
    Mutant("correlate: a row of taps at the border is left out", "kernels/geometry.py",
           "high = (size - 1 - first) // step + 1 if", "high = (size - 1 - first) // step if",
           GRID("loop and forward")),
    Mutant("correlate: rows of taps in the padding are not left out", "kernels/geometry.py",
           "low = (step - 1 - first) // step if first < 0 else 0", "low = 0", GRID("loop and forward")),
    Mutant("correlate: left border off by one", "kernels/correlate.py",
           "before = min(max(ceil_div(-first, g.step_w), 0), count)",
           "before = min(max(ceil_div(-first, g.step_w) - 1, 0), count)", GRID("loop and forward")),
    Mutant("correlate: every pixel is gathered where some are read", "kernels/correlate.py",
           "row + i * g.step_h", "row + i", "tests/test_strategies.py"),
    Mutant("correlate: another block's x is taken for this one's", "kernels/correlate.py",
           "if block != held:", "if held < 0:", GRID("loop and forward")),
    Mutant("correlate: right border is not zero", "kernels/correlate.py",
           "fill_zero(scratch, target + inside * g.pixel, after * g.pixel)", "pass", GRID("loop and forward")),
    Mutant("correlate: blocks of a sum overwrite", "kernels/correlate.py", "e, e_0, e_m, add = y, y_q, g.y_q, True",
           "e, e_0, e_m, add = y, y_q, g.y_q, False", "tests/test_long_sums.py"),
    Mutant("weight_grad: a slice is not summed", "kernels/weight_grad.py", "for piece in range(g.slices):",
           "for piece in range(max(1, g.slices - 1)):", GRID("loop and weight_grad")),
    Mutant("weight_grad: a block overwrites", "kernels/weight_grad.py", "                        add = True\n",
           "                        add = False\n", GRID("loop and weight_grad")),
    Mutant("weight_grad: the last row of a slice", "kernels/weight_grad.py",
           "p_1 = min(p_0 + g.block_p, g.p, p_0 + last - next_line)", "p_1 = min(p_0 + g.block_p, g.p)",
           GRID("loop and weight_grad")),
    Mutant("weight_grad: lines in the padding are left out of dy alone", "kernels/weight_grad.py",
           "a_s + first * down * pitch", "a_s", GRID("loop and weight_grad")),
    Mutant("weight_grad: dilation", "kernels/weight_grad.py", "a_s = a_0 + (r - r_0) * g.dilation_h * pitch",
           "a_s = a_0 + (r - r_0) * pitch", GRID("loop and weight_grad")),
    Mutant("weight_grad: accumulate", "kernels/weight_grad.py", "if not g.accumulate:\n                    row[:] = 0",
           "row[:] = 0", "tests/test_strategies.py -k 'accumulate and float32 and loop'"),
    Mutant("narrow: a phase reads another's rows", "kernels/narrow.py", "(h.before_h - h.top) *", "0 *",
           GRID("loop and input_grad")),
    Mutant("narrow: a phase has another's weights", "kernels/narrow.py", "packed, h.packed_0 + ", "packed, ",
           GRID("loop and input_grad")),
    Mutant("narrow: scratch is not cleared", "kernels/narrow.py", "            fill_zero(scratch, s_0, g.s_sums)\n", "",
           GUARDS),
    Mutant("narrow: pixels past the end", "kernels/simd.py", "address, builder.select(exists, valid, none))",
           "address, valid)", GUARDS),
    Mutant("tasks: a rest is forgotten", "kernels/tasks.py", "if task < (part + 1) * tasks // workers:",
           "if task < part * tasks // workers + tasks // workers:", "tests/test_tasks.py"),
    Mutant("bias: the last block is too long", "kernels/bias.py", "min(g.block, g.pixels - first)", "g.block", GUARDS),
    Mutant("packing: a tap's rows", "kernels/packing.py", "tap // g.Q * g.w_r + tap % g.Q * g.w_q",
           "tap % g.Q * g.w_r + tap // g.Q * g.w_q", GRID("loop and forward")),
    Mutant("packing: a panel's last columns", "kernels/packing.py", "columns = min(width, g.columns - j)",
           "columns = min(width, g.columns - j - 1)", GRID("loop and input_grad")),
    Mutant("col2im: stride", "kernels/patches.py", "if up < 0 or up % g.stride_h or up //", "if up < 0 or up //",
           GRID("im2col and input_grad")),
    Mutant("depthwise: rows of taps read the first one's x", "kernels/depthwise.py",
           'builder.mul(i64(row), value["x_r"])', 'builder.mul(i64(0), value["x_r"])',
           GRID("depthwise and weight_grad")),
    Mutant("depthwise: border of a tile", "kernels/depthwise.py", 'builder.icmp_signed("<", last, value["w"]))',
           'builder.icmp_signed("<=", last, value["w"]))', GUARDS),
    Mutant("winograd: border", "kernels/winograd.py", "ceil_div(size - first, step)))",
           "ceil_div(size - first, step) - 1))", GRID("winograd and forward")),
    Mutant("winograd: a phase overwrites the one before", "kernels/winograd.py", "width_d, phase > 0, bias, y",
           "width_d, False, bias, y", GRID("winograd and forward")),
    Mutant("winograd: a phase's weight gradient goes to another's taps", "kernels/winograd.py",
           "piece * g.part + g.w_0 +", "piece * g.part +", GRID("winograd and weight_grad")),
    Mutant("winograd: pixels of another phase", "kernels/winograd.py", "u * g.stride_h + i * step_h * down",
           "u + i * step_h * down", GRID("winograd and forward")),
    Mutant("winograd: last channels", "kernels/winograd.py", "return ceil_div(size - LANES + 1, block)",
           "return ceil_div(size - LANES, block)", GRID("winograd and forward")),
    Mutant("loop: sums are not cut", "strategies/loop.py", "SUM_STEPS = 576", "SUM_STEPS = 2**30",
           "tests/test_accuracy.py tests/test_long_sums.py"),
    Mutant("loop: cuts follow the threads", "strategies/loop.py", "slices = min(max(1, lines * q // SLICE_PIXELS),",
           "slices = min(max(1, machine.threads()),", THREADS + "'bits_depend or serial_twins'"),
    Mutant("half types: accumulate", "storage.py", "total = _wide(dw) if accumulate else",
           "total = _wide(dw) if False else", "tests/test_storage.py -k weight"),
    # ------------------------------------------------------------------ threads, forks, cache
    Mutant("jit: fastmath", "kernels/jit.py", '"fastmath": False', '"fastmath": True',
           "tests/test_long_sums.py -k reorder"),
    Mutant("jit: an orphan launches", "kernels/jit.py", "if workers <= 1 or _launcher.orphaned:", "if workers <= 1:",
           THREADS + "forked_child"),
    Mutant("jit: workqueue is entered twice", "kernels/jit.py", 'elif _launcher.start() != "workqueue":',
           'elif _launcher.start() != "":', THREADS + "many_threads"),
    Mutant("jit: a claim locks its own thread out", "kernels/jit.py",
           'return self.inside.setdefault("launch", me) == me',
           'return "launch" not in self.inside and self.inside.setdefault("launch", me) == me', THREADS + "ctrl_c"),
    Mutant("jit: locks stay locked in a child", "kernels/jit.py",
           "before=_launcher.before_fork, after_in_parent=compiler_lock.release, after_in_child=_launcher.after_fork",
           "after_in_child=lambda: None", FAULTS + "forked_while"),
    Mutant("jit: Ctrl-C strikes the compiler", "kernels/jit.py",
           "if threading.current_thread() is not threading.main_thread() or", "if True or", CACHE + "reach"),
    Mutant("jit: a part of a compilation waits for it", "kernels/jit.py", " or compiler_lock.is_locked():", ":",
           CACHE + "part"),
    Mutant("jit: no checksum", "kernels/jit.py", "if hashlib.sha256(identity + payload).digest() == checksum else None",
           "if payload else None", CACHE + "damaged"),
    Mutant("jit: options are not in the key", "kernels/jit.py", "(self.name, sorted(self.options.items()), key)",
           "(self.name, key)", CACHE + "options"),
    Mutant("jit: a kernel's identity is not in its checksum", "kernels/jit.py",
           "hashlib.sha256(identity + payload).digest() + payload", "hashlib.sha256(payload).digest() + payload",
           CACHE + "'another_kernels or round_trip'"),
    Mutant("files: not moved into place at once", "files.py", "os.replace(temporary, path)",
           "shutil.copyfile(temporary, path)", FAULTS + "killed"),
    Mutant("files: a swept folder is an error", "files.py", "_ATTEMPTS = 5", "_ATTEMPTS = 1", FAULTS + "swept"),
    Mutant("files: a warning for each file", "files.py", "_told.setdefault(place, error)",
           "_told.setdefault(path, error)", FAULTS + "full_disk"),
    Mutant("files: Ctrl-C leaves a file", "files.py", "except BaseException:", "except OSError:",
           FAULTS + "middle_of_a_write"),
    Mutant("files: what is in use is removed", "files.py", "os.utime(folder)", "pass", FAULTS + "month"),
    Mutant("arrays: unused buffers are kept", "arrays.py", "self.clear()  # what is kept may be what is missing",
           "pass", FAULTS + "unused_buffers"),
    Mutant("arrays: a buffer is reused too early", "arrays.py",
           "return np.ndarray(shape, dtype, _buffers.take(nbytes))",
           "return np.ndarray(shape, dtype, _buffers.take(nbytes).base)", "tests/test_arrays.py"),
    # ------------------------------------------------------------------ checks
    Mutant("checks: overlap", "checks.py", "if np.may_share_memory(out, array) and _overlap(out, array):", "if False:",
           "tests/test_checks.py"),
    Mutant("checks: bools are integers", "checks.py", "if isinstance(value, (bool, np.bool_)):", "if False:",
           "tests/test_hostile.py"),
    Mutant("checks: out may be read-only", "checks.py", "if not out.flags.writeable:", "if False:",
           "tests/test_hostile.py"),
    Mutant("plans: equal options share a plan", "ops.py", "dtype, repr((options, more))", "dtype, str(more)",
           "tests/test_ops.py -k 'options or padding'"),
)  # fmt: skip


def copy(mutant: Mutant, folder: Path) -> None:
    """Copy the package to a folder and make the mistake."""
    shutil.copytree(PACKAGE, folder / "nhwconv", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "nhwconv" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: the text is {text.count(mutant.old)} times in {mutant.file}: {mutant.old}")
    path.write_text(text.replace(mutant.old, mutant.new))


def is_killed(mutant: Mutant) -> bool:
    """Return whether a test fails on the mutant; an error of pytest itself is not a failure."""
    with tempfile.TemporaryDirectory() as folder:
        copy(mutant, Path(folder))
        environment = {**os.environ, "PYTHONPATH": folder, "HYPOTHESIS_PROFILE": "found"}
        if mutant.file.startswith(("kernels/", "files")):  # all else runs on the package's own kernels
            environment["NHWCONV_CACHE_DIR"] = folder
        command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {mutant.tests}"
        done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode < 0 or done.returncode > 128:  # a signal killed it: out of bounds, in pytest's own process
        return True
    if done.returncode not in (0, 1):
        raise SystemExit(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.returncode == 1


def main() -> int:
    """Run the mutants; print a table of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="the mutants that have this in their names")
    only = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if only in mutant.name]
    survivors = []
    for mutant in chosen:
        start = time.monotonic()
        killed = is_killed(mutant)
        survivors += [] if killed else [mutant]
        print(f"{'killed' if killed else 'SURVIVED':<9} {time.monotonic() - start:4.0f} s  {mutant.name}", flush=True)
    print(f"{len(chosen)} mutants, {len(survivors)} survived")
    return len(survivors)


if __name__ == "__main__":
    raise SystemExit(main())
