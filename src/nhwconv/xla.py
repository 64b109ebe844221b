"""Python functions as XLA's custom calls: they read XLA's buffers and write into them, so nothing is copied.

XLA's foreign function interface is a C header (``xla/ffi/api/c_api.h``, version 0.x; its structures only ever grow at
the end). What is needed of it is written down here with `ctypes`, so there is nothing to build. Within a call no
operation of JAX may run: it could wait for threads that wait for the call.

XLA does not know when Python ends. A call that came then would wait for an interpreter that waits for XLA. So calls
pass a gate of a few machine instructions, which at the end of Python is shut: before it is, calls under way end, and
afterwards calls return an error without touching the interpreter.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import re
import time
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["handler"]

Array = npt.NDArray[Any]

#: XLA's numbers of the dtypes of buffers.
_DTYPES: dict[int, np.dtype[Any]] = {
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    12: np.dtype(np.float64),
    16: np.dtype(ml_dtypes.bfloat16),
}

_METADATA = 1  # an extension that asks what a handler is, in place of a call
_EXECUTE = 3  # the stage in which arguments are there
_STRING = 4  # the type of an attribute
_INTERNAL = 13  # an error code
_MAJOR = 0  # the version of the interface that is described here
_HEADER = "xla/ffi/api/c_api.h"


class _Base(Structure):
    _fields_ = [("size", c_size_t), ("extension", c_void_p)]


class _Extension(Structure):
    _fields_ = [("size", c_size_t), ("type", c_int), ("next", c_void_p), ("metadata", c_void_p)]


class _Version(_Base):
    _fields_ = [("major", c_int), ("minor", c_int)]


class _Metadata(Structure):
    _fields_ = [("size", c_size_t), ("version", _Version), ("traits", c_uint32)]


class _Buffer(_Base):
    _fields_ = [("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))]


class _Buffers(_Base):
    _fields_ = [("count", c_int64), ("types", c_void_p), ("items", POINTER(POINTER(_Buffer)))]


class _Text(Structure):
    _fields_ = [("start", POINTER(c_char)), ("length", c_size_t)]


class _Attributes(_Base):
    _fields_ = [
        ("count", c_int64),
        ("types", POINTER(c_int)),
        ("names", POINTER(POINTER(_Text))),
        ("items", POINTER(POINTER(_Text))),
    ]


class _Error(_Base):
    _fields_ = [("message", c_char_p), ("code", c_int)]


_make_error = ctypes.CFUNCTYPE(c_void_p, POINTER(_Error))


class _Api(_Base):
    _fields_ = [("version", _Version), ("internal", c_void_p), ("make_error", _make_error)]


class _Frame(_Base):
    _fields_ = [
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


_handler_type = ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))


def handler(function: Callable[[str, list[Array], list[Array]], None], include: str) -> Any:
    """Make an XLA handler that calls ``function(text, arguments, results)``; it lives as long as the process.

    `text` is the call's one attribute, a string. The arrays are XLA's buffers; results are to be written. An exception
    becomes an error of XLA with its message. `include` is the folder of XLA's headers, which tell its version.
    """
    major, minor = _version(Path(include, _HEADER).read_text())
    if major != _MAJOR:
        raise ImportError(f"nhwconv.jax knows version {_MAJOR} of XLA's foreign function interface, not {major}")

    def called(frame: Any) -> int | None:
        frame = frame.contents
        if frame.extension:
            extension = _Extension.from_address(frame.extension)
            if extension.type == _METADATA:
                metadata = _Metadata.from_address(extension.metadata)
                # XLA refuses another version than its own.
                metadata.version.major, metadata.version.minor = major, minor
                return None
        if frame.stage != _EXECUTE:
            return None
        try:
            attributes = frame.attributes
            assert attributes.count == 1
            assert attributes.types[0] == _STRING
            text = attributes.items[0].contents
            function(text.start[: text.length].decode(), _arrays(frame.arguments), _arrays(frame.results))
        except BaseException as error:  # whatever it is, it cannot pass through XLA
            message = f"{type(error).__name__}: {error}".encode()
            return int(frame.api.contents.make_error(_Error(ctypes.sizeof(_Error), None, message, _INTERNAL)))
        return None

    return _behind_gate(_handler_type(called))


def _version(header: str) -> tuple[int, int]:
    """Return the version of the interface that XLA's header describes."""
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(found["MAJOR"]), int(found["MINOR"])


def _arrays(buffers: Any) -> list[Array]:
    """Return a call's buffers as arrays."""
    found = []
    for i in range(buffers.count):
        buffer = buffers.items[i].contents
        dtype, shape = _DTYPES[buffer.dtype], tuple(buffer.dims[: buffer.rank])
        memory = (c_char * (dtype.itemsize * math.prod(shape))).from_address(buffer.data or 0)
        found.append(np.ndarray(shape, dtype, memory))
    return found


# --------------------------------------------------------------------------------------------- the gate

_GATE = """
@under_way = global i64 0
@shut = global i64 0
define ptr @enter(ptr %frame) {{
  %before = atomicrmw add ptr @under_way, i64 1 seq_cst
  %state = load atomic i64, ptr @shut seq_cst, align 8
  %open = icmp eq i64 %state, 0
  br i1 %open, label %inside, label %outside
inside:
  %called = call ptr inttoptr (i64 {python} to ptr)(ptr %frame)
  br label %leave
outside:
  %table_at = getelementptr i8, ptr %frame, i64 {table}
  %table = load ptr, ptr %table_at
  %make_at = getelementptr i8, ptr %table, i64 {make_error}
  %make = load ptr, ptr %make_at
  %error = call ptr %make(ptr inttoptr (i64 {ended} to ptr))
  br label %leave
leave:
  %result = phi ptr [ %called, %inside ], [ %error, %outside ]
  %after = atomicrmw sub ptr @under_way, i64 1 seq_cst
  ret ptr %result
}}
"""


def _behind_gate(called: Any) -> Any:
    """Return a handler that calls `called` until Python ends, and from then on returns an error."""
    ended = _Error(ctypes.sizeof(_Error), None, b"Python has ended, and nhwconv with it", _INTERNAL)
    text = _GATE.format(
        python=ctypes.cast(called, c_void_p).value,
        table=_Frame.api.offset,
        make_error=_Api.make_error.offset,
        ended=ctypes.addressof(ended),
    )
    for kept in (called, ended):  # for threads that are there when Python is not
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    engine = llvm.create_mcjit_compiler(
        llvm.parse_assembly(text), llvm.Target.from_default_triple().create_target_machine(jit=True)
    )
    engine.finalize_object()
    under_way, shut = (c_int64.from_address(engine.get_global_value_address(name)) for name in ("under_way", "shut"))
    enter = engine.get_function_address("enter")
    engine.detach()  # the code is never freed

    def close() -> None:
        shut.value = 1
        while under_way.value:
            time.sleep(0.001)

    def in_child() -> None:  # of a fork, where the threads of calls under way are missing
        under_way.value = 0

    atexit.register(close)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=in_child)
    return _handler_type(enter)
