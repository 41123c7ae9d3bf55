"""Weights in 4 bits that are rounded for what a model computes of a text: layer by layer, only one of them in memory.

Of each layer's matrices the inputs are seen that the text makes in float32; what they are like decides how a matrix is
rounded (`gptq`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from .architectures.base import load_weights
from .blocks import Blocks
from .gptq import gptq
from .quantize import Int4Recipe
from .source import Source

TEXT = Path(__file__).with_name("calibration.txt")
"""Passages of English novels and of state papers (all in the public domain), of this project's documents and code, and
of small pieces in other forms and languages, mixed."""
TOKENS, WINDOW = 16_384, 512
"""That are seen of a text, at most, and in how long pieces."""
_WINDOWS_AT_ONCE = 4


def calibration_windows(text: str, tokenizer: Tokenizer, context: int, what: str) -> Tensor:
    """The tokens of the beginning of a text in whole windows, int64 [n, length]. ValueError for less than one; `what`
    names the text."""
    # A token has some 4 characters: of a long text the beginning is enough.
    token_ids = tokenizer.encode(text[: 64 * TOKENS], add_special_tokens=False).ids
    length = min(WINDOW, context)
    windows = min(len(token_ids), TOKENS) // length
    if windows == 0:
        raise ValueError(f"{what}: {len(token_ids)} tokens are too few to calibrate with, expected {length} or more")
    return torch.tensor(token_ids[: windows * length]).reshape(windows, length)


class CalibratedBlocks(Int4Recipe):
    """The matrices of a source by the recipe, those of 4 bits rounded with a text. To be read in the order of the
    layers; for one thread."""

    @torch.no_grad()
    def __init__(self, source: Source, windows: Tensor) -> None:
        """source: in training form; windows: of token ids, int64 [n, length]. In memory are their residual streams and
        what all layers are given, one layer in float32, and the second moments of this layer's inputs; at first the
        embedding, too."""
        super().__init__(source.config.layers)
        self._source = source
        with torch.device("meta"):
            model = source.config.module()
        model.load_begin(source, windows)
        self._states = [model.begin(ids) for ids in windows.split(_WINDOWS_AT_ONCE)]
        """What the next layer is given, of so many windows each."""
        self._layers = model.layers
        self._next = 0
        self._moments: dict[str, Tensor] = {}

    def read(self, name: str) -> Blocks | None:
        if self.type(name) == "int8":
            return None
        prefix, layer, own = name.split(".", 2)
        assert prefix == "layers" and int(layer) >= self._next - 1, name
        while int(layer) >= self._next:
            self._run_layer()
        weight = self._layers[int(layer)].get_parameter(own).detach().numpy()
        return gptq(weight, self._moments[name], self.type(name), name)

    @torch.no_grad()
    def _run_layer(self) -> None:
        if self._next:
            self._layers[self._next - 1] = nn.Identity()  # its weights are not needed any more
        layer, prefix = self._layers[self._next], f"layers.{self._next}."
        load_weights(layer, self._source, prefix)
        moments = Moments(layer, prefix)
        self._states = [(layer(x, *shared), shared) for x, shared in self._states]
        self._moments = moments.close()
        self._next += 1


class Moments:
    """Sums of x x^T over the inputs of a module's matrices, float32 [k, k], by names that begin with `prefix`."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self._sums: dict[str, Tensor] = {}
        self._last: tuple[Tensor | None, str] = (None, "")  # several matrices have one input
        self._names: dict[str, str] = {}
        linears = ((name, its) for name, its in module.named_modules() if isinstance(its, nn.Linear))
        self._hooks = [its.register_forward_pre_hook(self._hook(f"{prefix}{name}.weight")) for name, its in linears]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen, owner = self._last
            if inputs[0] is seen:
                self._names[name] = owner
                return
            self._last = inputs[0], name
            self._names[name] = name
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            if name in self._sums:
                self._sums[name].addmm_(rows.T, rows)
            else:
                self._sums[name] = rows.T @ rows

        return see

    def close(self) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.remove()
        self._last = None, ""
        return {name: self._sums[owner] for name, owner in self._names.items()}
