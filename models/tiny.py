"""What the tiny checkpoints of video families are made of, besides a family's own networks with random weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from models.base import VideoLimits
from models.video import narrow

LIMITS = VideoLimits(
    size_multiple=16, max_pixels=64 * 96, max_side=96, max_frames=9, max_steps=50, max_prompt=200, width=96, height=64,
    frames=9, fps=8, steps=3, guidance=2.0,
)  # fmt: skip
M = TypeVar("M", bound=nn.Module)


def byte_pairs(lines: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges from these lines: a frequent word is one token, any other text its bytes."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(lines, trainer)
    plain.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def stirred(network: M) -> M:
    """Its vectors, which begin as ones and zeros, each moved apart: a norm that is taken for another then shows."""
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return network.eval()


def write(pipe: Any, folder: Path) -> None:
    """The pipeline as real checkpoints are: its networks in bfloat16."""
    for part in pipe.components.values():
        if hasattr(part, "parameters"):
            narrow(part)
    pipe.save_pretrained(folder)
