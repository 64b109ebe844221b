"""The lines of calls: what is written is read, and what is none is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nhwconv import verbose
from nhwconv.problem import PASSES
from nhwconv.strategies import REGISTRY
from nhwconv.verbose import Call
from nhwconv.workloads import parse_layer

LAYER = "n2h9w8c4d6k3x2s2p0x1x1x0g2"


@given(
    st.dictionaries(st.sampled_from(PASSES), st.sampled_from(list(REGISTRY)), min_size=1),
    st.sampled_from(["float32", "float64", "float16"]),
    st.integers(0, 10**9),
)
def test_lines_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, ran: dict[str, str], dtype: str, tenths: int
) -> None:
    file = tmp_path_factory.mktemp("log") / "calls"
    layer = parse_layer(LAYER)
    text = verbose.line(ran, layer.problem(dtype), tenths / 1e7)  # type: ignore[arg-type]
    file.write_text(f"epoch 1\n{text}\nloss 0.5, nhwconv,\n")
    assert verbose.read(file) == [Call(tuple(ran), layer, dtype, tuple(ran.values()), tenths / 10)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nhwconv,forward", 'line 3: "nhwconv,forward" is not of the form nhwconv,pass,layer,dtype,strategy,'),
        (f"nhwconv,forward,{LAYER},float32,loop,1,2", "is not of the form"),
        (f"nhwconv,backward,{LAYER},float32,loop,1", 'line 3: there is no pass "backward"'),
        ("nhwconv,forward,n2,float32,loop,1", 'line 3: layer "n2": "h" is missing'),
        (f"nhwconv,forward+weight_grad,{LAYER},float32,loop,1", "line 3: 2 passes, but 1 strategies"),
        (f"nhwconv,forward,{LAYER},float32,loop,fast", "line 3: could not convert string to float: 'fast'"),
    ],
)
def test_what_begins_as_a_line_and_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "calls"
    file.write_text(f"\n\n{text}\n")
    with pytest.raises(ValueError, match=r"^line 3: ") as caught:
        verbose.read(file)
    assert message in str(caught.value)
