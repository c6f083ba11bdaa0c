"""Which layer of a network gets which format: one for all, and rules that say otherwise by the pattern of a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from quant_runtime.formats import W16A16, QuantFormat

SHOWN = 8  # names of layers that an error shows


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches `pattern` get `format`; W16A16 leaves them as they are.

    `*` is any text, `?` one character, `[02]` one of these; case counts. A pattern matches a layer's whole dotted name,
    or what is left of it behind any dot: `blocks.0.*` is everything in block 0, `ffn.*` every feed-forward layer,
    `to_q` every layer of that name, and `blocks.1.*` does not reach block 10.
    """

    pattern: str
    format: QuantFormat

    def matches(self, name: str) -> bool:
        parts = name.split(".")
        return any(fnmatchcase(".".join(parts[i:]), self.pattern) for i in range(len(parts)))


def formats(
    network: nn.Module, inside: Sequence[str], default: QuantFormat, rules: Iterable[Rule]
) -> dict[str, QuantFormat]:
    """The format of each layer `inside`, of others of the network that a rule asks for, and of no more; in their order.

    `default` is that of the layers inside. Of several rules that match a layer the last wins. A rule that matches
    layers inside means these alone; one that matches none of them means the network's other linear layers (embedders,
    head). ValueError names a pattern that matches no layer at all.
    """
    chosen = dict.fromkeys(inside, default)
    order = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    outside = [name for name in order if name not in chosen]
    for rule in rules:
        met = [name for name in inside if rule.matches(name)] or [name for name in outside if rule.matches(name)]
        if not met:
            raise ValueError(f"{rule.pattern!r} matches no linear layer; there are {', '.join(_some(inside, outside))}")
        chosen |= dict.fromkeys(met, rule.format)
    within = {*inside}
    return {name: chosen[name] for name in order if name in within or chosen.get(name, W16A16).quantized}


def _some(inside: Sequence[str], outside: Sequence[str]) -> list[str]:
    """Names that show what patterns could be of: each kind of layer once, as far as there is room."""
    kinds: dict[str, str] = {}
    for name in (*inside, *outside):
        kinds.setdefault("".join(c for c in name if not c.isdigit()), name)
    names = list(kinds.values())
    return names if len(names) <= SHOWN else [*names[: SHOWN - 2], "…", names[-1]]
