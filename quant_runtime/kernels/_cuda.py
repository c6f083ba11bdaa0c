"""Kernels in CUDA C++ for one generation of cards: compiled when first asked for, kept on the disk.

They run on torch's stream. `driver is None` where CUDA's own bindings for Python are not installed, which torch for
CUDA brings: there is Triton then. A source is a file beside this one; what it is compiled for are `#define`s, and every
set of them is another kernel.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_runtime.kernels._triton import triton

driver: Any = None
nvrtc: Any = None
if importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None:
    driver = importlib.import_module("cuda.bindings.driver")
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")

Defines = tuple[tuple[str, int], ...]
Told = Callable[[str, float, bool], None]

listeners: list[Told] = []  # each hears of every kernel that is made ready: its name, in how many seconds, if from disk


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether kernels for sm_90a run there: that code runs on no other generation, older or newer."""
    there = driver is not None and device.type == "cuda" and torch.cuda.is_available()
    return there and torch.cuda.get_device_capability(device) == (9, 0)


class Kernel:
    """One entry of a source, with `shared` bytes of shared memory, on the device that is current when it is made."""

    def __init__(self, file: str, entry: str, shared: int, defines: Defines = ()) -> None:
        start = time.perf_counter()
        code, cached = _compiled(Path(__file__).with_name(file), defines)
        torch.cuda.current_stream()  # torch has made its context, and it is the current one
        self._module = _checked(driver.cuModuleLoadData(code))
        self._entry = _checked(driver.cuModuleGetFunction(self._module, entry.encode()))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._entry, most, shared))
        self._shared = shared
        for tell in tuple(listeners):
            tell(entry, time.perf_counter() - start, cached)

    def at_once(self, threads: int) -> int:
        """Programs of so many threads that a processor runs at once: more would wait until some have ended."""
        return int(_checked(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._entry, threads, self._shared)))

    def __call__(self, programs: int, threads: int, *args: object, together: bool = False) -> None:
        """Tensors and None go as addresses, ints as 32 bits, in a list as 64, floats as float32, maps as they are.

        `together`: programs wait for one another. None begins before there is room for all; more than that are refused.
        """
        values: list[object] = []
        kinds: list[object] = []
        for arg in args:
            if isinstance(arg, list):
                values += arg
                kinds += [ctypes.c_longlong] * len(arg)
                continue
            address = arg is None or isinstance(arg, Tensor)
            values.append(arg.data_ptr() if isinstance(arg, Tensor) else 0 if arg is None else arg)
            kinds.append(
                ctypes.c_void_p if address
                else ctypes.c_float if isinstance(arg, float)
                else ctypes.c_int if isinstance(arg, int)
                else None
            )  # fmt: skip
        stream = torch.cuda.current_stream().cuda_stream
        given = (tuple(values), tuple(kinds))
        size = (programs, 1, 1, threads, 1, 1, self._shared, stream)
        if together:
            _checked(driver.cuLaunchCooperativeKernel(self._entry, *size, given))
        else:
            _checked(driver.cuLaunchKernel(self._entry, *size, given, 0))


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it: contiguous, and at a multiple of 16 bytes, as loads of 16 bytes need it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def tiles(x: Tensor, rows: int, columns: int) -> Any:
    """How the copy engine takes tiles [rows, columns] of x [R, C], one or two bytes an element.

    A tile's rows are 128 bytes, or 64. In each eight of them, 16-byte pieces lie swizzled as the matrix units read
    them; beyond x there are zeros, and what is stored there is dropped.
    """
    size = x.element_size()
    width = columns * size
    if x.dim() != 2 or size > 2 or x.stride(1) != 1 or x.stride(0) * size % 16 or width not in (64, 128):
        found = f"{columns} columns of {x.dtype} {list(x.shape)} {x.stride()}"
        raise ValueError(f"tiles takes [R, C] of 1 or 2 bytes, rows at multiples of 16, 64 or 128 wide; got {found}")
    d, u32, u64 = driver, driver.cuuint32_t, driver.cuuint64_t
    swizzle = d.CUtensorMapSwizzle
    kind = d.CUtensorMapDataType
    return _checked(
        d.cuTensorMapEncodeTiled(
            kind.CU_TENSOR_MAP_DATA_TYPE_UINT8 if size == 1 else kind.CU_TENSOR_MAP_DATA_TYPE_UINT16,
            2,
            x.data_ptr(),
            [u64(x.shape[1]), u64(x.shape[0])],
            [u64(x.stride(0) * size)],
            [u32(columns), u32(rows)],
            [u32(1), u32(1)],
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle.CU_TENSOR_MAP_SWIZZLE_128B if width == 128 else swizzle.CU_TENSOR_MAP_SWIZZLE_64B,
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def tiled(x: Tensor) -> bool:
    """Whether head_tiles takes x as it lies."""
    strides = [stride for stride, count in zip(x.stride()[:3], x.shape, strict=False) if count > 1]
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in strides)


def head_tiles(x: Tensor, rows: int) -> Any:
    """How the copy engine takes `rows` tokens of a head of x [B, H, N, D], 16 bits an element, D a multiple of 64.

    A tile lies in rows of 128 bytes, swizzled as those of `tiles` are: first 64 channels of all its tokens, then the
    next. Its coordinates are (0, token, 0, head, batch). Behind the last token of a head there are zeros.
    """
    if x.dim() != 4 or x.element_size() != 2 or x.shape[3] % 64 or not tiled(x):
        raise ValueError(
            f"head_tiles takes 16 bits [B, H, N, 64 n] at multiples of 16; got {x.dtype} {list(x.shape)} {x.stride()}"
        )
    batch, heads, tokens, size = x.shape
    steps = [2 * stride if count > 1 else 128 for stride, count in zip(x.stride(), x.shape, strict=True)]
    d, u32, u64 = driver, driver.cuuint32_t, driver.cuuint64_t
    return _checked(
        d.cuTensorMapEncodeTiled(
            d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,
            5,
            x.data_ptr(),
            [u64(64), u64(tokens), u64(size // 64), u64(heads), u64(batch)],
            [u64(steps[2]), u64(128), u64(steps[1]), u64(steps[0])],
            [u32(64), u32(rows), u32(size // 64), u32(1), u32(1)],
            [u32(1)] * 5,
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _compiled(source: Path, defines: Defines) -> tuple[bytes, bool]:
    """Machine code for sm_90a, and whether it lay on the disk, where Triton keeps its own."""
    text, common = source.read_bytes(), _headers(source)
    options, version = _options(defines), _checked(nvrtc.nvrtcVersion())
    name = hashlib.sha256(repr((version, options, common)).encode() + text).hexdigest()
    kept = Path(triton.knobs.cache.dir) / f"{source.stem}-{name[:32]}.cubin" if triton is not None else None
    if kept is not None:
        with suppress(OSError):  # not there, or another user's: then it is compiled
            return kept.read_bytes(), True

    code, _ = assembled(source, defines)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(f"{kept.name}.{os.getpid()}.{threading.get_ident()}")
        aside.write_bytes(code)
        aside.replace(kept)
    return code, False


def assembled(source: Path, defines: Defines, *more: bytes) -> tuple[bytes, str]:
    """Machine code for sm_90a, and what the compiler has to say. RuntimeError, with that, where it does not compile."""
    common, options = _headers(source), [*_options(defines), *more]
    given = (source.read_bytes(), source.name.encode(), len(common), [*common.values()], [*common])
    program = _checked(nvrtc.nvrtcCreateProgram(*given))
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    said = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, said))
    log = said.rstrip(b"\0").decode(errors="replace").strip()
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{source.name} does not compile: {log}")
    code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code, log


def _headers(source: Path) -> dict[bytes, bytes]:
    return {one.name.encode(): one.read_bytes() for one in sorted(source.parent.glob("*.cuh"))}


def _options(defines: Defines) -> list[bytes]:
    return [b"--gpu-architecture=sm_90a", b"--std=c++17", *(f"-D{name}={value}".encode() for name, value in defines)]


def _checked(result: Sequence[Any]) -> Any:
    """What a call answers behind its status, or RuntimeError with the status by its name."""
    status, *answer = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status.name}")
    return answer[0] if len(answer) == 1 else tuple(answer) if answer else None
