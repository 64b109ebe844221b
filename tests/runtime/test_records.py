"""Records: classes of named integers, which bodies read in memory by the same names."""

import numpy as np
import pytest

from nhwconv import planning
from nhwconv.codegen.simd import integers
from nhwconv.program import Program, Step, places
from nhwconv.runtime.jit import Body
from nhwconv.runtime.records import Record, pack, record


class Images(Record):
    """Some fields."""

    n: int
    h: int  #: with a comment


class Outputs(Record):
    """Others, and one of the same name."""

    p: int
    n: int


class Both(Images, Outputs):
    """The fields of both, and one more."""

    more: int


def test_a_class_has_the_fields_of_what_it_is_made_of():
    """In the order of its ancestors, each once."""
    assert Images.names == ("n", "h")
    assert set(Both.names) == {"n", "h", "p", "more"}
    assert Both.names[-1] == "more"
    assert Both.dtype == np.dtype([(name, np.int64) for name in Both.names])


@pytest.mark.parametrize(
    ("values", "wrong"), [({"n": 1}, "h"), ({"n": 1, "h": 2, "w": 3}, "w"), ({}, "h"), ({"n": 1, "H": 2}, "H")]
)
def test_every_field_is_given_and_no_other(values, wrong):
    """A wrong name is told."""
    with pytest.raises(TypeError, match=f"^Images: fields differ: .*{wrong}"):
        Images(**values)


def test_fields_are_attributes():
    """And nothing else is."""
    images = Images(n=3, h=True)
    assert (images.n, images.h) == (3, True)
    with pytest.raises(AttributeError, match="w"):
        _ = images.w


def test_records_are_packed_as_integers():
    """One behind the other; flags and NumPy's integers are integers."""
    packed = pack([Images(n=np.int32(-5), h=True), Images(n=2**40, h=0)])
    assert packed.view(np.int64).tolist() == [-5, 1, 2**40, 0]
    assert packed.dtype == Images.dtype


def test_a_native_function_stands_for_its_address(monkeypatch):
    """It is compiled when records are packed, not when they are made."""
    compiled = []

    class Function:
        def __int__(self):
            compiled.append(1)
            return 4096

    images = Images(n=1, h=Function())
    assert not compiled
    assert pack([images])["h"][0] == 4096


def test_bodies_read_records_by_their_names():
    """The i-th of those that lie at an address."""

    def read(operands, geometry, worker, task, fresh):
        g = record(geometry, task, Both)
        target = integers(integers(operands)[0])
        target[4 * task], target[4 * task + 1] = g.n, g.h
        target[4 * task + 2], target[4 * task + 3] = g.p, g.more

    records = tuple(Both(n=10 * i, h=i - 7, p=2**50 + i, more=-i) for i in range(5))
    y = np.zeros((5, 4), np.int64)
    planning.execute(Program((Step(Body(read), records, 5, places("y")),)), y=y)
    assert y.tolist() == [[r.n, r.h, r.p, r.more] for r in records]
