"""`lowbit dev`: what is made for tests and measurements. Imported by the command line when it is called."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from models import synthetic
from models.published import PUBLISHED
from service import offline

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def synth(name: str, folder: Path, seed: int, dtype: str | None, console: Console) -> None:
    """ValueError names what there is."""
    if name not in PUBLISHED:
        raise ValueError(f"no published checkpoint {name!r}: there are {', '.join(PUBLISHED)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype is {', '.join(DTYPES)}; got {dtype}")
    with offline.byte_bars(console) as show:
        synthetic.write(
            PUBLISHED[name], folder, partial(show, f"writing {name}"), seed=seed, dtype=DTYPES[dtype] if dtype else None
        )
    console.print(f"{folder} holds a transformer with random weights: it can be quantized with --stream, and not run")
