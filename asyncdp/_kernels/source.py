"""Numba's side of the kernels: CUDA's machine for `bodies`, and PTX of the kernels made with it.

The only module that imports Numba's CUDA target. Nothing here needs a device or a driver.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import bodies


@contextmanager
def _row_stack() -> Iterator[None]:
    """Let NumPy have `row_stack`, which version 2.5 has removed, for the duration of the block.

    numba-cuda 0.30.4 registers an implementation for it when `numba.cuda.np.arrayobj` is imported and never
    reads it again. The name is removed again because it belongs to the user's NumPy, which code may examine.
    Only the import of this module runs this, so no two threads do at once.
    """
    if hasattr(np, "row_stack"):
        yield
        return
    np.row_stack = np.vstack
    try:
        yield
    finally:
        del np.row_stack


# The import also uses what NumPy 2.5 deprecates, an error for a caller who turns warnings into errors.
with warnings.catch_warnings(), _row_stack():
    warnings.simplefilter("ignore", DeprecationWarning)
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba import cuda as numba_cuda
    from numba import types as numba_types
    from numba.cuda.compiler import compile_cuda
    from numba.cuda.extending import intrinsic
    from numba.cuda.np import arrayobj  # noqa: F401  before the first compilation imports it

# Numba's own annotations do not cover what is used here.
cuda: Any = numba_cuda
types: Any = numba_types

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _pointer(builder: Any, address: Any, pointee: Any) -> Any:
    # Address space 1 is global memory: a generic pointer would cost a check at every access.
    return builder.inttoptr(address, ir.PointerType(pointee, addrspace=1))


def _vector_access(element: Any, count: int) -> tuple[Any, Any]:
    """Make the load and store of a 16-byte vector, seen as a tuple of `count` numbers."""
    tuple_type = types.UniTuple(element, count)

    def load(typing_context, address):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            vector = ir.VectorType(context.get_data_type(element), count)
            value = builder.load(_pointer(builder, arguments[0], vector), align=16)
            parts = [builder.extract_element(value, _I32(i)) for i in range(count)]
            return context.make_tuple(builder, tuple_type, parts)

        return tuple_type(types.int64), emit

    def store(typing_context, address, value):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            vector = ir.VectorType(context.get_data_type(element), count)
            packed = ir.Constant(vector, ir.Undefined)
            for i in range(count):
                part = builder.extract_value(arguments[1], i)
                packed = builder.insert_element(packed, part, _I32(i))
            builder.store(packed, _pointer(builder, arguments[0], vector), align=16)
            return context.get_dummy_value()

        return types.void(types.int64, tuple_type), emit

    return intrinsic(load), intrinsic(store)


def _scalar_access(element: Any) -> tuple[Any, Any]:
    """Make the load and store of one naturally aligned number."""

    def load(typing_context, address):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.load(_pointer(builder, arguments[0], context.get_data_type(element)))

        return element(types.int64), emit

    def store(typing_context, address, value):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            value = context.cast(builder, arguments[1], signature.args[1], element)
            builder.store(value, _pointer(builder, arguments[0], context.get_data_type(element)))
            return context.get_dummy_value()

        return types.void(types.int64, element), emit

    return intrinsic(load), intrinsic(store)


def _narrow(emit_operation: Callable[[Any, Any, Any], Any]) -> Any:
    """Make an operation on two numbers known to fit 32 bits, which spares the calls of 64-bit arithmetic."""

    def operation(typing_context, a, b):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return emit_operation(builder, *(builder.trunc(argument, _I32) for argument in arguments))

        return types.int64(types.int64, types.int64), emit

    return intrinsic(operation)


_divide = _narrow(lambda builder, a, b: builder.zext(builder.udiv(a, b), _I64))
_multiply = _narrow(lambda builder, a, b: builder.mul(builder.zext(a, _I64), builder.zext(b, _I64)))


def _to_float(emit_operation: Callable[[Any, Any], Any]) -> Any:
    """Make an operation from the bits of a float in the low end of a word to a float32."""

    def operation(typing_context, bits):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return emit_operation(builder, arguments[0])

        return types.float32(types.uint32), emit

    return intrinsic(operation)


def _emit_half_to_float(builder: Any, bits: Any) -> Any:
    convert = ir.InlineAsm(ir.FunctionType(ir.FloatType(), [_I16]), "cvt.f32.f16 $0, $1;", "=f,h")
    return builder.call(convert, [builder.trunc(bits, _I16)])


def _pack_as(name: str) -> Any:
    """Make the rounding, to nearest even, of two float32 into one word of two 16-bit floats."""

    def pack(typing_context, high, low):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            kind = ir.FunctionType(_I32, [ir.FloatType(), ir.FloatType()])
            convert = ir.InlineAsm(kind, f"cvt.rn.{name}.f32 $0, $1, $2;", "=r,f,f")
            return builder.call(convert, arguments)

        return types.uint32(types.float32, types.float32), emit

    return intrinsic(pack)


_read, _ = _scalar_access(types.int64)
_load_words, _store_words = _vector_access(types.uint32, 4)
_bits_to_float = _to_float(lambda builder, bits: builder.bitcast(bits, ir.FloatType()))
_half_to_float = _to_float(_emit_half_to_float)


def _device(function: Callable[..., Any]) -> Any:
    dispatcher = cuda.jit(device=True)(function)
    # Numba would query the current device's capability, and there may be no device. What it makes here is
    # IR, which becomes code for a capability only together with the kernel.
    dispatcher.compile_device = functools.partial(_compile_device, dispatcher)
    return dispatcher


def _compile_device(dispatcher: Any, types_of_arguments: Any, return_type: Any = None) -> Any:
    if types_of_arguments not in dispatcher.overloads:
        result = compile_cuda(
            dispatcher.py_func, return_type, types_of_arguments, cc=(8, 0), nvvm_options={"opt": 3}
        )
        dispatcher.overloads[types_of_arguments] = result
        result.target_context.insert_user_function(result.entry_point, result.fndesc, [result.library])
    return dispatcher.overloads[types_of_arguments]


def _pairwise(add: Any, count: int) -> Any:
    """Apply `add` to two tuples of `count` numbers."""
    if count == 2:
        return _device(lambda a, b: (add(a[0], b[0]), add(a[1], b[1])))
    if count == 4:
        return _device(lambda a, b: (add(a[0], b[0]), add(a[1], b[1]), add(a[2], b[2]), add(a[3], b[3])))
    low, high = _pairwise(add, 4), _pairwise(add, 4)
    return _device(lambda a, b: low(a[:4], b[:4]) + high(a[4:], b[4:]))


def _plain(element: Any, count: int) -> dict[str, Any]:
    """Describe numbers that are added as they lie in memory."""
    load, store = _vector_access(element, count)
    load_one, store_one = _scalar_access(element)
    add = _device(lambda a, b: element(a + b))
    return _operations(16 // count, (load, _pairwise(add, count), store), (load_one, add, store_one))


def _packed(element: Any, sign_bits: int) -> dict[str, Any]:
    """Describe small integers, added several to a 32-bit word."""
    signs = types.uint32(sign_bits)
    add_packed = _device(bodies.add_packed)
    add_word = _device(lambda a, b: types.uint32(add_packed(a, b, signs)))
    load_one, store_one = _scalar_access(element)
    add_one = _device(lambda a, b: element(a + b))
    vector = (_load_words, _pairwise(add_word, 4), _store_words)
    return _operations(element.bitwidth // 8, vector, (load_one, add_one, store_one))


def _half(unpack_low: Any, unpack_high: Any, pack: Any) -> dict[str, Any]:
    """Describe 16-bit floats, added as float32 and rounded once."""
    low, high, half_word = _device(unpack_low), _device(unpack_high), types.uint16
    load_bits, store_bits = _scalar_access(half_word)

    def load(address):  # type: ignore[no-untyped-def]
        a, b, c, d = _load_words(address)
        return low(a), high(a), low(b), high(b), low(c), high(c), low(d), high(d)

    def store(address, v):  # type: ignore[no-untyped-def]
        words = (pack(v[1], v[0]), pack(v[3], v[2]), pack(v[5], v[4]), pack(v[7], v[6]))
        _store_words(address, words)

    def store_one(address, value):  # type: ignore[no-untyped-def]
        store_bits(address, half_word(pack(value, value) & 0xFFFF))

    add = _device(lambda a, b: a + b)
    scalar = (_device(lambda address: low(types.uint32(load_bits(address)))), add, _device(store_one))
    return _operations(2, (_device(load), _pairwise(add, 8), _device(store)), scalar)


def _operations(itemsize: int, vector: tuple[Any, Any, Any], scalar: tuple[Any, Any, Any]) -> dict[str, Any]:
    names = ("load_vector", "add_vectors", "store_vector", "load_scalar", "add_scalars", "store_scalar")
    return {"itemsize": itemsize, **dict(zip(names, (*vector, *scalar), strict=True))}


def _machine(**operations: Any) -> SimpleNamespace:
    return SimpleNamespace(
        device=_device,
        block=_device(lambda: types.int64(cuda.blockIdx.x)),
        thread=_device(lambda: types.int64(cuda.threadIdx.x)),
        read=_read,
        divide=_divide,
        multiply=_multiply,
        **operations,
    )


def _bfloat16() -> dict[str, Any]:
    low = _device(lambda word: _bits_to_float(types.uint32(word << 16)))
    high = _device(lambda word: _bits_to_float(types.uint32(word & 0xFFFF0000)))
    return _half(low, high, _pack_as("bf16x2"))


def _float16() -> dict[str, Any]:
    low = _device(lambda word: _half_to_float(word))
    high = _device(lambda word: _half_to_float(types.uint32(word >> 16)))
    return _half(low, high, _pack_as("f16x2"))


def _copy_units() -> list[tuple[int, tuple[Any, Any]]]:
    narrow = (types.uint64, types.uint32, types.uint16, types.uint8)
    return [
        (16, (_load_words, _store_words)),
        *((kind.bitwidth // 8, _scalar_access(kind)) for kind in narrow),
    ]


_SUMS: dict[str, Callable[[], dict[str, Any]]] = {
    "float64": lambda: _plain(types.float64, 2),
    "float32": lambda: _plain(types.float32, 4),
    "float16": _float16,
    "bfloat16": _bfloat16,
    "int64": lambda: _plain(types.uint64, 2),
    "int32": lambda: _plain(types.uint32, 4),
    "int16": lambda: _packed(types.uint16, 0x80008000),
    "int8": lambda: _packed(types.uint8, 0x80808080),
}


@functools.cache
def _function(kernel: str) -> Any:
    # Cached with its compiled parts: for another architecture only the kernel itself is compiled again.
    if kernel == "copy":
        return bodies.make_copy(_machine(units=_copy_units()))
    return bodies.make_reduce_add(_machine(**_SUMS[kernel.removeprefix("reduce_add_")]()))


def ptx(kernel: str, capability: tuple[int, int]) -> str:
    """Compile a kernel for a compute capability to PTX whose entry has the kernel's name."""
    function = _function(kernel)
    text, _ = cuda.compile(
        function,
        types.void(*[types.int64] * function.__code__.co_argcount),
        cc=capability,
        device=False,
        abi="numba",
        # Two blocks to a multiprocessor leave each thread 128 registers: none is spilled to memory.
        launch_bounds=(bodies.THREADS, 2),
    )
    mangled = text.split(".visible .entry ", 1)[1].split("(", 1)[0]
    return str(text).replace(mangled, kernel)
