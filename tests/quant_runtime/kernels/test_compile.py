"""Every Triton kernel compiles for the GPUs that run it, on a machine without one: as far as such a machine can go.

The interpreter runs the kernels' arithmetic; this file, started as a program without it, sends what `launch` would
launch through Triton's compiler and NVIDIA's assembler.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from quant_runtime.formats import pack
from quant_runtime.kernels import (
    attention_blocks,
    attention_fp8,
    block_map,
    blocks_by_mass,
    gelu_quantize,
    hadamard,
    hadamard_quantize,
    linear_packed,
    linear_w8a8,
    map_pass,
    norm_quantize,
    pack_heads,
    quantize_heads,
    quantize_rows,
    residual_passes,
    unpack,
)
from quant_runtime.kernels._triton import TensorDescriptor, triton

CARDS = {"Hopper": (90, 227), "Ada": (89, 99), "Blackwell": (100, 227)}
# by name: what Triton calls it, and the KiB of shared memory that a program can have there
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}


def launches() -> Iterator[Callable[[], object]]:
    """One call of every kernel, in the dtypes and the branches that a GPU runs."""
    rows = torch.zeros(300, 256, dtype=torch.bfloat16)
    q, row_scale = rows.to(torch.int8), torch.ones(300)
    w, scale = torch.zeros(96, 256, dtype=torch.int8), torch.ones(96)
    factor = torch.ones(256)
    signs = torch.ones(256, dtype=torch.int8)
    yield lambda: quantize_rows.launch(rows, 8, factor)
    yield lambda: quantize_rows.launch(rows, 8, None, torch.float8_e4m3fn)
    lost = torch.zeros(1, 300, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    values, left = (torch.zeros(1, 300, 2, width, dtype=torch.int8) for width in (128, 16))
    per_row, right, one = torch.ones(1, 2, 300), torch.zeros(1, 2, 128, 16), torch.ones(())
    cached = (lost, values, per_row, left, per_row, right, one)
    yield lambda: residual_passes.launch_differences(*cached)
    yield lambda: residual_passes.launch_entry(*cached, right, one, 8)
    yield lambda: hadamard.launch(rows.float(), signs, 256)
    yield lambda: hadamard_quantize.launch(rows, signs, 64, 4, factor)
    yield lambda: hadamard_quantize.launch(rows, signs, 64, 8, None, torch.float8_e4m3fn)
    for inputs, block in ((3072, 1024), (12288, 4096), (5120, 1024)):  # as HunyuanVideo's and Wan's layers have them
        wide, its = torch.zeros(20, inputs, dtype=torch.bfloat16), torch.ones(inputs, dtype=torch.int8)
        yield lambda x=wide, s=its, block=block: hadamard_quantize.launch(x, s, block, 8, None)
    yield lambda: linear_w8a8.launch(q, w, row_scale, scale, scale, torch.bfloat16)
    yield lambda: linear_w8a8.launch(
        q, w[:95], row_scale, scale[:95], None, torch.float16
    )  # no rows for the copy engine
    yield lambda: linear_w8a8.launch(q[:20], w, row_scale[:20], scale, None, torch.float16)
    some = row_scale[:20], scale, None, torch.float32
    for bits in (2, 3, 4, 7):  # each plane alone, two, and three of them
        yield lambda bits=bits: unpack.launch(pack(w, bits), 256, bits)
        yield lambda bits=bits: linear_packed.launch_few_rows(q[:20], pack(w, bits), bits, *some)
    yield lambda: unpack.launch(pack(w[:, :33], 4), 33, 4)  # byte by byte
    yield lambda: unpack.launch(pack(w, 4), 256, 4, torch.float8_e4m3fn)

    head = torch.zeros(1, 2, 200, 128, dtype=torch.bfloat16)
    small, whole = head[..., :64], head.to(torch.int8)
    pooled = block_map.pool_reference(head, 64)
    kept, counts = block_map.choose_reference(pooled, pooled, 2, None, None)
    tokens = torch.ones(1, 2, 200)
    yield lambda: quantize_heads.launch(small, quantize_heads.key_center(small), 64)
    yield lambda: block_map.launch_pool(head, 64)
    yield lambda: block_map.launch_choose(pooled, pooled, 2, torch.ones(4).bool(), torch.ones(4).bool())
    means, each = torch.zeros(1, 2, 4, 128), torch.ones(1, 2, 4)
    bounds = (0.9, 1, 4, torch.ones(4).bool(), torch.ones(4).bool())
    yield lambda: blocks_by_mass.launch(means, means, *bounds, each, each, 0.1)
    yield lambda: blocks_by_mass.launch(means, means, 0.9, 1, 4, None, None, None, None, 0.0)
    yield lambda: attention_blocks.launch(small, small, small, kept, counts, 64, 64, None, None, 0.1)
    yield lambda: attention_blocks.launch(whole, whole, head, kept, counts, 64, 64, tokens, tokens, 0.1)
    few = kept[:, :, :2], counts[:, :, :2], 128, 128, None, None, 0.1
    for size in (64, 128, 256):  # float32 takes the most memory; its blocks are larger than what goes at a time
        real = torch.zeros(1, 2, 200, size)
        yield lambda x=real: attention_blocks.launch(x, x, x, *few)

    modulation = torch.ones(1, 4, 256, dtype=torch.bfloat16).unbind(1)
    yield lambda: norm_quantize.launch(rows[None], *modulation[:2], rows[None], modulation[2], 1e-6, 8, factor, 0)
    plain = (rows[None], *modulation[:2], None, None, 1e-6)
    yield lambda: norm_quantize.launch(*plain, 8, None, 0, torch.float8_e4m3fn)
    yield lambda: norm_quantize.launch_plain(*plain, 0)
    two = torch.ones(3, 1, 2, 256, dtype=torch.bfloat16)  # CogVideoX: one modulation of the text, one of the video
    yield lambda: norm_quantize.launch(rows[None], two[0], two[1], rows[None], two[2], 1e-6, 8, None, 226)
    yield lambda: gelu_quantize.launch(rows, rows[:, :128], 8, None, False)
    yield lambda: gelu_quantize.launch(rows, None, 8, None, True)
    yield lambda: gelu_quantize.launch(rows, rows[:, :128], 8, None, False, torch.float8_e4m3fn)
    features = torch.zeros(2, 256, 3, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    places = (torch.zeros(9, 128), torch.zeros(6, 128))
    larger, channel = torch.zeros(2, 256, 6, 9, dtype=torch.bfloat16), rows[0]
    yield lambda: map_pass.launch(features, 6, 9, channel, *places, larger, None, False)
    yield lambda: map_pass.launch(features, 3, 5, channel, None, None, features, features, True)
    yield lambda: map_pass.launch_answer(features, channel, torch.zeros(2, 256), torch.zeros(2))
    broad = torch.zeros(20, 1100, dtype=torch.bfloat16)  # rows of several parts, the last of them not whole
    of_broad = torch.ones(3, 1, 1100).unbind(0)
    yield lambda: norm_quantize.launch(broad[None], *of_broad[:2], broad[None], of_broad[2], 1e-6, 8, None, 0)
    yield lambda: gelu_quantize.launch(broad, rows[:20], 8, None, True, torch.float8_e4m3fn)
    norm, angles, none = torch.ones(128, dtype=torch.bfloat16), torch.ones(150, 64), (None, None)
    yield lambda: pack_heads.launch(head, head, head, 128, norm, norm, norm, norm, 1e-6, angles, angles, 0, *none)
    together = torch.ones(2 * 128, dtype=torch.bfloat16)
    short = angles.half()
    yield lambda: pack_heads.launch(head, head, head, 128, together, together, *none, 1e-6, short, short, 0, *none)
    yield lambda: pack_heads.launch(small, small, small, 64, *none, *none, 1e-6, *none, 0, *none)
    places = torch.arange(200, dtype=torch.int32).expand(1, 2, 200)
    yield lambda: pack_heads.launch(head, head, head, 128, norm, norm, *none, 1e-6, short, short, 0, *none, places)
    layer, slim = torch.ones(64, dtype=torch.bfloat16), short[:, :32]  # CogVideoX and VGGT: a layer norm, heads of 64
    yield lambda: pack_heads.launch(small, small, small, 128, layer, layer, *none, 1e-6, slim, slim, 26, layer, layer)
    for x, block in ((head, 128), (small, 64), (small, 128)):
        operands = pack_heads.reference(x, x, x, block, *none, *none, 1e-6, *none, 0, *none)[:6]
        x_means = block_map.pool_reference(x, block)
        kept, counts = block_map.choose_reference(x_means, x_means, 1, None, None)
        q, q_scale, k, k_scale, v, v_scale = operands
        rest = (kept, counts, 200, block, block, torch.bfloat16, 0.1)
        given = (q, k, v, q_scale, k_scale, v_scale, *rest)
        yield lambda given=given: attention_fp8.launch(*given, None, None)
        yield lambda given=given, x=x: attention_fp8.launch(*given, x, None)
        yield lambda given=given, x=x: attention_fp8.launch(*given, x.to(torch.int8), torch.ones(1, 2, 200))
        yield lambda given=given: attention_fp8.refresh_launch(*given)
        yield lambda given=given: attention_fp8.lse_launch(*given)
        yield lambda given=given, x=x: attention_fp8.launch(*given, x, None, places)
        yield lambda given=given: attention_fp8.refresh_launch(*given, places)


class Recorder:
    """Stands where a kernel stands, and compiles what it is asked to launch."""

    def __init__(self, kernel: Any, card: str) -> None:
        self.kernel = kernel
        self.capability, self.kib = CARDS[card]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.compile

    def compile(self, *args: object, **named: object) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {name: named.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in named}
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        fixed = {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr or given[p.name] is None}
        signature = {name: "constexpr" if name in fixed else _type(given[name]) for name in self.kernel.arg_names}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= self.kib << 10, f"{self.kernel.__name__}: {compiled.metadata.shared} bytes"
        print(self.kernel.__name__, list(signature.values()), compiled.metadata.shared, "bytes of shared memory")


def _type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    return "fp32" if isinstance(value, float) else "i32"


def main(card: str) -> None:
    for its in (hadamard_quantize, linear_w8a8):  # they choose by what a program can have
        its.shared_kib = lambda device: CARDS[card][1]
    for module in (attention_blocks, attention_fp8, block_map, blocks_by_mass, gelu_quantize, hadamard):
        record_kernels(module, card)
    for module in (
        hadamard_quantize,
        linear_packed,
        linear_w8a8,
        map_pass,
        norm_quantize,
        pack_heads,
        quantize_heads,
        quantize_rows,
        residual_passes,
        unpack,
    ):
        record_kernels(module, card)
    for launch in launches():
        launch()


def record_kernels(module: Any, card: str) -> None:
    """In the place of each kernel that the module launches: `name[grid](...)` in its source."""
    for name in set(re.findall(r"\b(_[a-z]\w*)\[(?:grid\b|\()", inspect.getsource(module))):
        setattr(module, name, Recorder(getattr(module, name), card))


@pytest.mark.timeout(900)  # some sixty of them for each, on a machine that may have other work
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_every_kernel_compiles_for_every_card_and_fits_it(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.quant_runtime.kernels.test_compile"]
    kind: dict[str, Any] = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = {card: subprocess.Popen([*command, card], **kind) for card in CARDS}
    said = {card: (its.communicate()[1], its.returncode) for card, its in running.items()}
    assert {card: text[-2000:] for card, (text, code) in said.items() if code} == {}


if __name__ == "__main__":
    main(sys.argv[1])
