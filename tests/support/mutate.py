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


GRID = "tests/properties/test_strategies.py -k 'test_grid and float32 and {}'".format
GUARDS = "tests/properties/test_guard_pages.py -k memory"
THREADS = "tests/properties/test_threads.py -k "
FAULTS = "tests/properties/test_faults.py -k "
LONG = "tests/properties/test_long_sums.py"
BUNDLES = "tests/strategies/winograd/test_bundles.py"
GROUPED = "tests/strategies/grouped/test_grouped.py"
STORE = "tests/runtime/test_store.py -k "
JIT = "tests/runtime/test_jit.py -k "
EXECUTOR = "tests/runtime/test_executor.py -k "
HALF = "tests/strategies/test_half.py -k "
PROGRAM = "tests/test_program.py -k "
PLAN = "tests/test_planning.py -k "

MUTANTS = (
    # ------------------------------------------------------------------ sums, borders, strides, tails
    Mutant("tile: tail dropped", "codegen/tile.py", 'tail = builder.sub(value["columns"], i64((self.v - 1) *',
           'tail = builder.sub(value["columns"], i64(1 + (self.v - 1) *', GRID("loop and forward")),
    Mutant("tile: tail too long", "codegen/tile.py", 'tail = builder.sub(value["columns"], i64((self.v - 1) *',
           'tail = builder.sub(value["columns"], i64(-1 + (self.v - 1) *', GUARDS),
    Mutant("tile: every vector starts from the first one's bias", "codegen/tile.py",
           "first = emit.load(builder.gep(self.e, [i64(j * emit.lanes)]), mask)",
           "first = emit.load(builder.gep(self.e, [i64(0)]), mask)",
           "tests/properties/test_strategies.py -k 'bias_is_added and loop'"),
    Mutant("tile: a sum starts from what it continues", "codegen/tile.py",
           'one_row = builder.icmp_signed("==", value["e.row"], i64(0))',
           'one_row = builder.icmp_signed("==", value["e.row"], value["e.row"])', LONG),
    Mutant("tile: E is added where it is not asked for", "codegen/tile.py",
           'self._finish(builder.and_(value["add"], builder.not_(one_row)), masked)',
           "self._finish(builder.not_(one_row), masked)", "tests/codegen/test_tile.py"),
    Mutant("tile: the rest of the rows is computed again", "codegen/tile.py",
           "done = builder.mul(larger, builder.add(fewer, i64(1)))", "done = builder.mul(larger, fewer)",
           "tests/codegen/test_tile.py"),
    Mutant("correlate: stride of rows", "strategies/direct/correlate.py",
           "(p - block.p_0) * source.down * source.pitch", "(p - block.p_0) * source.pitch", GRID("loop and forward")),
    Mutant("correlate: a row past the border", "strategies/direct/gather.py", "if 0 <= source < g.h:",
           "if 0 <= source <= g.h:", GUARDS),
    Mutant("correlate: a row of taps at the border is left out", "strategies/blocking.py",
           "high = (size - 1 - first) // step + 1 if", "high = (size - 1 - first) // step if",
           GRID("loop and forward")),
    Mutant("correlate: rows of taps in the padding are not left out", "strategies/blocking.py",
           "low = (step - 1 - first) // step if first < 0 else 0", "low = 0", GRID("loop and forward")),
    Mutant("correlate: left border off by one", "strategies/direct/gather.py",
           "before = min(max(ceil_div(-first, g.step_w), 0), count)",
           "before = min(max(ceil_div(-first, g.step_w) - 1, 0), count)", GRID("loop and forward")),
    Mutant("correlate: every pixel is gathered where some are read", "strategies/direct/gather.py",
           "row + i * g.step_h", "row + i", "tests/properties/test_strategies.py"),
    Mutant("correlate: another block's x is taken for this one's", "strategies/direct/correlate.py",
           "if held[0] != block.number:", "if held[0] < 0:", GRID("loop and forward")),
    Mutant("correlate: what was held in the run before is taken for this one's", "strategies/direct/correlate.py",
           "        if fresh:\n            held[0] = -1\n", "", "tests/properties/test_strategies.py"),
    Mutant("correlate: right border is not zero", "strategies/direct/gather.py",
           "fill_zero(at(target, inside * g.pixel), after * g.pixel)", "pass", GRID("loop and forward")),
    Mutant("correlate: a phase reads another's weights", "strategies/direct/correlate.py",
           "at(numbers(table[1], ITEMSIZE), g.packed_0)", "numbers(table[1], ITEMSIZE)",
           "tests/strategies/test_direct.py"),
    Mutant("correlate: blocks of two phases have the same number", "strategies/direct/correlate.py",
           "_Block(number + g.first_task,", "_Block(number,", "tests/properties/test_strategies.py"),
    Mutant("folded: a rest of a row is forgotten", "problem.py", "return size == out * kernel and", "return",
           "tests/strategies/test_direct.py"),
    Mutant("correlate: blocks of a sum overwrite", "strategies/direct/correlate.py",
           "g.add_bias != 0 if first else True,", "g.add_bias != 0 if first else False,", LONG),
    Mutant("weight_grad: a slice is not summed", "strategies/direct/weight_grad.py",
           "\n        for piece in range(g.slices):", "\n        for piece in range(max(1, g.slices - 1)):",
           GRID("loop and weight_grad")),
    Mutant("weight_grad: a block overwrites", "strategies/direct/weight_grad.py", "                add = True\n",
           "                add = False\n", GRID("loop and weight_grad")),
    Mutant("weight_grad: the last row of a slice", "strategies/direct/weight_grad.py",
           "p_1 = min(p_0 + g.block_p, g.p, p_0 + last - line)", "p_1 = min(p_0 + g.block_p, g.p)",
           GRID("loop and weight_grad")),
    Mutant("weight_grad: lines in the padding are left out of dy alone", "strategies/direct/weight_grad.py",
           "+ s * g.dilation_w * pixel + first * x_side.line", "+ s * g.dilation_w * pixel",
           GRID("loop and weight_grad")),
    Mutant("weight_grad: dilation", "strategies/direct/weight_grad.py",
           "start = (r - t.r_0) * g.dilation_h * pitch", "start = (r - t.r_0) * pitch", GRID("loop and weight_grad")),
    Mutant("weight_grad: accumulate", "strategies/direct/weight_grad.py",
           "        if not g.accumulate:\n            fill_zero(row, g.depth)", "        fill_zero(row, g.depth)",
           "tests/properties/test_strategies.py -k 'accumulate and float32 and loop'"),
    Mutant("narrow: a phase reads another's rows", "strategies/direct/narrow.py", "(h.before_h - h.top) *", "0 *",
           GRID("loop and input_grad")),
    Mutant("narrow: a phase has another's weights", "strategies/direct/narrow.py", "at(packed, h.packed_0 + ",
           "at(packed, ", GRID("loop and input_grad")),
    Mutant("narrow: scratch is not cleared", "strategies/direct/narrow.py",
           "        if fresh:\n            fill_zero(scratch, g.s_sums)\n", "", GUARDS),
    Mutant("narrow: pixels past the end", "codegen/simd.py", "address, builder.select(exists, valid, none))",
           "address, valid)", GUARDS),
    Mutant("tasks: a rest is forgotten", "runtime/tasks.py", "if task < (part + 1) * tasks // workers:",
           "if task < part * tasks // workers + tasks // workers:", "tests/runtime/test_tasks.py"),
    Mutant("bias: the last part is too long", "strategies/bias.py", "min(BLOCK, g.pixels - first)", "BLOCK", GUARDS),
    Mutant("bias: repeated once more than there is room", "strategies/bias.py", "for i in range(g.times):",
           "for i in range(g.times + 1):", GUARDS),
    Mutant("packing: a tap's rows", "codegen/packing.py", "tap // g.Q * g.w_r + tap % g.Q * g.w_q",
           "tap % g.Q * g.w_r + tap // g.Q * g.w_q", GRID("loop and forward")),
    Mutant("packing: a panel's last columns", "codegen/packing.py", "columns = min(width, g.columns - j)",
           "columns = min(width, g.columns - j - 1)", GRID("loop and input_grad")),
    Mutant("packing: a record's tasks", "runtime/records.py", "task >= record(geometry, i + 1, kind).first_task",
           "task > record(geometry, i + 1, kind).first_task", "tests/codegen/test_packing.py"),
    Mutant("col2im: stride", "strategies/im2col/patches.py", "if up < 0 or up % g.stride_h or up //",
           "if up < 0 or up //", GRID("im2col and input_grad")),
    Mutant("depthwise: rows of taps read the first one's x", "strategies/grouped/weight_grad.py",
           'builder.mul(i64(row), value["x_r"])', 'builder.mul(i64(0), value["x_r"])',
           GRID("depthwise and weight_grad")),
    Mutant("depthwise: border of a tile", "strategies/grouped/rows.py",
           'builder.icmp_signed("<", last, value["columns"])', 'builder.icmp_signed("<=", last, value["columns"])',
           GUARDS),
    Mutant("depthwise: groups that begin within a vector are stored past the caches", "strategies/grouped/correlate.py",
           " and spread.whole * spread.dg % lanes == 0", "", "tests/strategies/grouped/test_grouped.py -k not_aligned"),
    Mutant("winograd: border", "strategies/winograd/tiles.py", "ceil_div(size - first, step)))",
           "ceil_div(size - first, step) - 1))", GRID("winograd and forward")),
    Mutant("winograd: a phase overwrites the one before", "strategies/winograd/correlate.py",
           "phase > 0,", "False,", GRID("winograd and forward")),
    Mutant("winograd: a phase's weight gradient goes to another's taps", "strategies/winograd/weight_grad.py",
           "piece * g.part + g.w_0 +", "piece * g.part +", GRID("winograd and weight_grad")),
    Mutant("winograd: pixels of another phase", "strategies/winograd/tiles.py",
           "u * g.stride_h + i * step_h * down", "u + i * step_h * down", GRID("winograd and forward")),
    Mutant("winograd: last channels", "strategies/blocking.py", "ceil_div(size - lanes + 1, block))",
           "ceil_div(size - lanes, block))", GRID("winograd and forward")),
    Mutant("winograd: a bundle of groups has the first one's weights", "strategies/winograd/correlate.py",
           "own, first + i, j, k,", "own, first, j, k,", BUNDLES),
    Mutant("winograd: a bundle of groups has the first one's x", "strategies/winograd/correlate.py",
           "at(scratch, i * channels), at(m,", "at(scratch, 0), at(m,", BUNDLES),
    Mutant("winograd: a bundle of groups has the first one's dy", "strategies/winograd/weight_grad.py",
           "at(f, i * d), f_apart", "f, f_apart", BUNDLES),
    Mutant("winograd: what is outside is read", "strategies/winograd/transform.py",
           "self.builder.sext(flag, I64)", "i64(-1)", "tests/strategies/winograd/test_transform.py"),
    Mutant("depthwise: every channel is the groups' first", "strategies/grouped/rows.py",
           "self.builder.add(places, self.emitter.splat(self.builder.trunc(k, number)))", "places", GROUPED),
    Mutant("depthwise: a permutation lacks the last group's channels", "strategies/grouped/rows.py",
           "literal.pattern.cg - 1 if literal.pattern.permuted else 0", "0", GROUPED),
    Mutant("turning: a block of images overwrites gradients", "strategies/turning.py",
           "accumulate or start > 0", "accumulate", "tests/test_layouts.py -k blocks"),
    Mutant("turning: half types are rounded between blocks", "strategies/turning.py", " and itemsize > 2", "",
           "tests/test_layouts.py -k half_types"),
    Mutant("turning: every block has the first images", "strategies/turning.py",
           "Place(name, start * size)", "Place(name, 0)", "tests/test_layouts.py -k blocks"),
    Mutant("arrays: a forked child shares scratch", "runtime/arrays.py", "mmap.mmap(-1, nbytes, **_PRIVATE)",
           "mmap.mmap(-1, nbytes)", "tests/runtime/test_arrays.py -k forked"),
    Mutant("plain: groups", "strategies/plain.py", "x[n, i, j, first + c] * w[k, h, v, c]",
           "x[n, i, j, c] * w[k, h, v, c]", GRID("plain and forward")),
    Mutant("loop: sums are not cut", "strategies/direct/constants.py", "sum_steps: int = 576",
           "sum_steps: int = 2**30", f"tests/properties/test_accuracy.py {LONG}"),
    Mutant("loop: cuts follow the threads", "strategies/direct/weight_grad.py",
           "slices = min(max(1, lines * q // CUT.slice_pixels),", "slices = min(max(1, wanted.workers),",
           THREADS + "'bits_depend or both_forms'"),
    Mutant("half types: accumulate", "strategies/half.py",
           'yield _step(widen(name), count, "dw", total) if wanted.accumulate else', "yield", HALF + "weight"),
    Mutant("half types: ties are not rounded to even", "strategies/half.py",
           "h = np.uint32((f + np.uint32(0xC8000FFF) + odd)", "h = np.uint32((f + np.uint32(0xC8001000))",
           HALF + "nearest"),
    Mutant("half types: float64 is rounded twice", "strategies/half.py",
           "return np.uint32(bits - np.uint32(1) if abs(np.float64(f)) > abs(x) else bits) | np.uint32(1)",
           "return bits", HALF + "nearest"),
    Mutant("half types: a bias is not added in every strip", "strategies/half.py",
           'Wanted(wanted.bias and pass_ != "weight_grad",', "Wanted(False,", HALF + "bias_once"),
    # ------------------------------------------------------------------ programs and the executor
    Mutant("program: parts that live together share memory", "program.py",
           "if other.last >= span.first and span.last >= other.first", "if other.last > span.first",
           PROGRAM + "placed"),
    Mutant("program: parts start anywhere", "program.py",
           "size = -(-span.part.nbytes // ALIGNMENT) * ALIGNMENT", "size = span.part.nbytes", PROGRAM + "placed"),
    Mutant("program: a moved program keeps the images", "program.py",
           "return replace(self, steps=steps, _images={})", "return replace(self, steps=steps)",
           PROGRAM + "images"),
    Mutant("program: an operand's offset is forgotten where it moves", "program.py",
           "Place(found.source, found.offset + place.offset)", "Place(found.source, found.offset)",
           PROGRAM + "moved"),
    Mutant("executor: an operand's offset is forgotten", "runtime/executor.py",
           "operands[i] = table[image[place]] + image[place + 1]", "operands[i] = table[image[place]]",
           EXECUTOR + "operands"),
    Mutant("executor: scratch is not aligned", "runtime/executor.py",
           "stack(_ROOM)) + 63 & -64", "stack(_ROOM))", EXECUTOR + "operands"),
    Mutant("executor: the queue is not cleared", "runtime/executor.py", "            clear_queue(queue, workers)\n", "",
           EXECUTOR + "steps"),
    Mutant("executor: an orphan launches", "runtime/executor.py", "if workers <= 1 or launcher.orphaned:",
           "if workers <= 1:", THREADS + "forked_child"),
    Mutant("executor: workqueue is entered twice", "runtime/executor.py", 'elif launcher.start() != "workqueue":',
           'elif launcher.start() != "":', THREADS + "many_threads"),
    Mutant("executor: a claim locks its own thread out", "runtime/executor.py",
           "return found is claim or (found == claim and not _interrupts_a_launch())", "return found is claim",
           EXECUTOR + "ctrl_c"),
    Mutant("executor: a handler's call gives back the claim of another", "runtime/executor.py",
           "return found is claim or (found == claim and not _interrupts_a_launch())", "return found == claim",
           EXECUTOR + "handler"),
    Mutant("executor: locks stay locked in a child", "runtime/executor.py",
           "before=launcher.before_fork, after_in_parent=compiler_lock.release, after_in_child=launcher.after_fork",
           "after_in_child=lambda: None", FAULTS + "forked_while"),
    Mutant("plans: a program for other threads", "planning.py",
           "return 1 if plan.serial else threads or machine.threads()",
           "return machine.__dict__.setdefault('_w', machine.threads())",
           PLAN + "number_of_threads"),
    Mutant("plans: a plan takes any dtype", "planning.py",
           "            and (second.dtype is dtype or second.dtype == dtype)\n", "", PLAN + "refuses_in_words"),
    Mutant("plans: programs are pickled", "planning.py",
           "return {f.name: getattr(self, f.name) for f in fields(self)}", "return dict(self.__dict__)",
           PLAN + "pickles"),
    # ------------------------------------------------------------------ compiling, store, files, memory
    Mutant("jit: fastmath", "runtime/jit.py", '"fastmath": False', '"fastmath": True', f"{LONG} -k reorder"),
    Mutant("jit: Ctrl-C strikes the compiler", "runtime/jit.py", "if not compiler_lock.is_locked():", "if False:",
           JIT + "reach"),
    Mutant("jit: a part of a compilation waits for it", "runtime/jit.py", "if not compiler_lock.is_locked():",
           "if True:", JIT + "part"),
    Mutant("jit: threads that compile have any stack", "runtime/jit.py", "compilation.begin(STACK)",
           "compilation.begin()", JIT + "little_stack"),
    Mutant("jit: Numba logs what it does", "runtime/jit.py", "log.setLevel(logging.INFO)", "pass", JIT + "quiet"),
    Mutant("jit: Numba's logger stays quiet", "runtime/jit.py", "        log.setLevel(before)", "        pass",
           JIT + "put_back"),
    Mutant("planning: half types need a compiler", "planning.py", "if half(problem.dtype) and jit.disabled():",
           "if False:", JIT + "without_a_compiler"),
    Mutant("store: no checksum", "runtime/store.py",
           "if hashlib.sha256(identity + payload).digest() == checksum else None", "if payload else None",
           STORE + "damaged"),
    Mutant("store: options are not in the key", "runtime/store.py", "(self.name, sorted(self.options.items()), key)",
           "(self.name, key)", STORE + "options"),
    Mutant("store: an entry's identity is not in its checksum", "runtime/store.py",
           "hashlib.sha256(identity + payload).digest() + payload", "hashlib.sha256(payload).digest() + payload",
           STORE + "'another_entrys or round_trip'"),
    Mutant("store: what decides code is left out of the version", "runtime/store.py",
           '("nhwconv.codegen", "nhwconv.runtime", "nhwconv.strategies")', '("nhwconv.codegen", "nhwconv.strategies")',
           STORE + "version_covers"),
    Mutant("store: what others wrote is run", "runtime/store.py",
           "return found.st_uid in (os.geteuid(), 0) and not found.st_mode & stat.S_IWOTH", "return True",
           STORE + "may_have_written"),
    Mutant("store: a folder called tilde", "runtime/store.py", 'if str(root).startswith("~"):', "if False:",
           STORE + "tilde"),
    Mutant("files: not moved into place at once", "runtime/files.py", "os.replace(temporary, path)",
           "shutil.copyfile(temporary, path)", FAULTS + "killed"),
    Mutant("files: a swept folder is an error", "runtime/files.py", "_ATTEMPTS = 5", "_ATTEMPTS = 1",
           FAULTS + "swept"),
    Mutant("files: a warning for each file", "runtime/files.py", "        _told.add(place)\n", "",
           FAULTS + "full_disk"),
    Mutant("files: folders that anybody may write to", "runtime/files.py", "mkdir(0o755, ", "mkdir(",
           STORE + "umask"),
    Mutant("files: Ctrl-C leaves a file", "runtime/files.py", "except BaseException:", "except OSError:",
           FAULTS + "middle_of_a_write"),
    Mutant("files: what is in use is removed", "runtime/files.py", "os.utime(folder)", "pass", FAULTS + "month"),
    Mutant("arrays: unused buffers are kept", "runtime/arrays.py",
           "release()  # what is kept may be what is missing", "pass", FAULTS + "unused_buffers"),
    Mutant("arrays: a buffer is reused too early", "runtime/arrays.py",
           "return np.ndarray(shape, dtype, _buffers.take(nbytes))",
           "return np.ndarray(shape, dtype, _buffers.take(nbytes).base)", "tests/runtime/test_arrays.py"),
    # ------------------------------------------------------------------ checks
    Mutant("checks: overlap", "checks.py", "if np.may_share_memory(out, array) and _overlap(out, array):", "if False:",
           "tests/test_checks.py"),
    Mutant("checks: bools are integers", "checks.py",
           '    if isinstance(value, (bool, np.bool_)):\n        fail(f"{name} is {value!r}, expected an integer",',
           '    if False:\n        fail(f"{name} is {value!r}, expected an integer",',
           "tests/properties/test_hostile.py"),
    Mutant("checks: out may be read-only", "checks.py", "if not out.flags.writeable:", "if False:",
           "tests/properties/test_hostile.py"),
    Mutant("checks: integers are not made ints", "checks.py", "    return number\n\n\ndef pair(",
           "    return value\n\n\ndef pair(", "tests/test_checks.py -k planned_by_their_value"),
    Mutant("plans: equal options share a plan", "ops.py",
           "if kind is not int and kind is not str and", "if False and", "tests/test_checks.py -k other_types"),
    Mutant("plans: tuples that are equal share a plan", "ops.py",
           "not (kind is tuple and _exact(*option))", "kind is not tuple", "tests/test_checks.py -k other_types"),
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
        if mutant.file.startswith(
            ("codegen/", "runtime/", "strategies/")
        ):  # all else runs on the package's own kernels
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
