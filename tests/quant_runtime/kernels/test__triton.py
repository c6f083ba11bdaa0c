import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None  # as where it is not installed
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
import torch
from quant_runtime.formats import W4A8
from quant_runtime.kernels import attention_blocks, block_map, hadamard_quantize, linear_packed
from quant_runtime.linear import LinearSpec, QuantLinear
assert linear_packed.triton is None
layer = QuantLinear.of(torch.ones(3, 4, dtype=torch.int8), torch.ones(3, dtype=torch.bfloat16), LinearSpec(W4A8))
print(layer(torch.ones(2, 4)).tolist())
"""


def test_without_triton_the_kernels_import_and_the_cpu_runs():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.strip() == str([[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]), done.stderr[-2000:]
