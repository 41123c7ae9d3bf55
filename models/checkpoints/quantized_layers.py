"""Linear layers as GPTQ, AWQ and compressed-tensors store them: codes in 32-bit words, a scale and a zero for every
group of inputs. A weight is scale * (code - zero), codes and zeros from 0 to 2^bits - 1.

What the tensors of a layer are, their shapes say: other bits or groups in some layers need nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..blocks import BLOCK, Blocks, Codes, Floats
from ..memories.base import ALL
from .checkpoint import CheckpointError
from .safetensors_files import SafetensorsFiles

Words = NDArray[np.int32]

_TYPES = {(4, True): "int4", (4, False): "int4_minimum", (8, True): "int8", (8, False): "int8_minimum"}
"""By bits, and whether all zeros are in the middle."""


def _words(codes: int, bits: int) -> int:
    """That hold so many codes."""
    return -(-codes * bits // 32)


def _unpacked(words: Words, bits: int) -> Codes:
    """The codes in each word, the lowest bits first. words: [..] -> [.., 32 / bits]."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(*words.shape, 4)
    return octets if bits == 8 else np.stack((octets & 15, octets >> 4), axis=-1).reshape(*words.shape, 8)


class Scheme(NamedTuple):
    """What config.json says of the layers."""

    runs: Collection[int]
    """How many inputs a group of one or another layer has, where it has not all."""
    needed: Collection[str] = ()
    """Tensors that every layer has beyond those that it needs to have."""
    symmetric: bool = False
    """Zeros are in the middle in most layers."""


class Layer(ABC):
    """One layer, [outputs, inputs]; its tensors are `name`.CODES and so on."""

    CODES: ClassVar[str] = "qweight"
    SCALES: ClassVar[str] = "scales"
    ZEROS: ClassVar[str] = "qzeros"
    INPUT_GROUPS: ClassVar[str] = "g_idx"
    """The group of each input, where groups are not runs of inputs."""
    SHAPE: ClassVar[str] = ""
    NEEDED: ClassVar[tuple[str, ...]] = ("qweight", "scales", "qzeros")

    def __init__(self, files: SafetensorsFiles, name: str, scheme: Scheme) -> None:
        """Looks at types and shapes. CheckpointError for tensors that are missing, of another type, of shapes that do
        not fit, or of bits that no type of blocks has."""
        self.files, self.name, self.scheme = files, name, scheme
        needed = [*self.NEEDED, *scheme.needed]
        for field in needed:
            if not self._has(field):
                raise self._error(f"it has no {field}, expected {', '.join(needed)}; download the model again")
        self._check_type(self.CODES, ["I32"])
        self._check_type(self.SCALES, ["F16", "BF16", "F32"])
        self._check_type(self.ZEROS, ["I32"])
        self._check_type(self.INPUT_GROUPS, ["I32", "I64"])
        self.outputs, self.inputs, self.groups, self.bits = self._measure()
        self._check_shape(self.INPUT_GROUPS, (self.inputs,))

    @property
    def middle(self) -> int:
        """The zero of symmetric codes."""
        return 1 << (self.bits - 1)

    def members(self) -> list[str]:
        """Names of the layer's tensors, but for a bias."""
        fields = (self.CODES, self.SCALES, self.ZEROS, self.INPUT_GROUPS, self.SHAPE)
        return [f"{self.name}.{field}" for field in fields if self._has(field)]

    def values(self, rows: slice = ALL) -> Floats:
        """Those rows of the weights, float32 [n, inputs]: products of float32."""
        groups = self._input_groups()
        values = self._codes(rows).astype(np.float32)
        values -= self._checked_zeros()[rows][:, groups]
        values *= self._scales()[rows][:, groups]
        return values

    def blocks(self, rows: slice = ALL) -> Blocks | None:
        """Those rows as they are stored. None if groups do not consist of whole blocks, in whichever order of inputs.

        The codes are the file's own, and so are scales that float16 holds, as it does bfloat16 from 2^-17 on; others,
        and minimums, -scale * zero, are rounded to float16: by at most 2^-11 of one, or 2^-25 where it is less than
        2^-14. CheckpointError for one that float16 does not hold: above 65504, or no number.
        """
        groups, order = self._input_groups(), None
        if not _in_blocks(groups):
            order = np.argsort(groups, kind="stable")
            groups = groups[order]
            if not _in_blocks(groups):
                return None
        zeros, of_block = self._checked_zeros(), groups[::BLOCK]
        symmetric = bool((zeros == self.middle).all())
        offset = self.middle if symmetric or self.bits == 8 else 0
        codes = np.subtract(self._codes(rows), np.uint8(offset), order="C").view(np.int8)  # modulo 256
        scales = self._halves(self._scales()[rows][:, of_block])
        minimums = None
        if not symmetric:
            minimums = self._halves(scales * (offset - zeros[rows][:, of_block].astype(np.float32)))
        codes = codes if order is None else codes[:, order]
        return Blocks(_TYPES[self.bits, symmetric], codes, scales, minimums, order=order)

    @abstractmethod
    def _measure(self) -> tuple[int, int, int, int]:
        """Outputs, inputs, groups and bits, if the shapes fit together."""

    @abstractmethod
    def _codes(self, rows: slice) -> Codes:
        """[n, inputs]"""

    @abstractmethod
    def _zeros(self) -> Codes:
        """[outputs, groups]"""

    @abstractmethod
    def _scales(self) -> Floats:
        """[outputs, groups]"""

    def _checked_zeros(self) -> Codes:
        """[outputs, groups]"""
        zeros = self._zeros()
        if self.scheme.symmetric and zeros[0, 0] != self.middle and (zeros == zeros[0, 0]).all():
            raise self._error(
                f"{self.ZEROS} are all {zeros[0, 0]}, expected {self.middle} of symmetric weights: they are stored in "
                "another way than config.json says; correct its checkpoint_format or packing_format"
            )
        return zeros

    def _input_groups(self) -> NDArray[np.int64]:
        """[inputs]"""
        if not self._has(self.INPUT_GROUPS):
            return np.arange(self.inputs) // self._run()
        groups: NDArray[np.int64] = self._stored(self.INPUT_GROUPS).astype(np.int64)
        least, most = groups.min(), groups.max()
        if least < 0 or most >= self.groups:
            raise self._error(
                f"{self.INPUT_GROUPS} has groups from {least} to {most}, expected 0 to {self.groups - 1}; the file is "
                "damaged, download it again"
            )
        return groups

    def _run(self) -> int:
        """Inputs of a group; the last one may have fewer."""
        for run in (self.inputs, *self.scheme.runs):
            if math.ceil(self.inputs / run) == self.groups:
                return run
        raise self._error(
            f"{self.SCALES} is of {self.groups} groups, expected as many as {self.inputs} inputs have in runs of "
            f"{' or '.join(map(str, self.scheme.runs))} (group_size); the file is damaged, or config.json another's"
        )

    def _halves(self, values: Floats) -> Floats:
        """Rounded to float16."""
        with np.errstate(over="ignore"):  # which the next line finds
            halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            raise self._error(
                "a scale, or a scale times a zero, is beyond 65504 or no number, expected what float16 holds; choose "
                "another quantisation of the model, or have its weights rounded anew: --weights int8"
            )
        return halves.astype(np.float32)

    def _has(self, field: str) -> bool:
        return f"{self.name}.{field}" in self.files.shapes

    def _stored(self, field: str, *index: slice) -> NDArray[Any]:
        return self.files.stored(f"{self.name}.{field}", *index).numpy()

    def _shape(self, field: str) -> tuple[int, int]:
        shape = self.files.shapes[f"{self.name}.{field}"]
        if len(shape) != 2 or 0 in shape:
            raise self._error(f"{field} has shape {list(shape)}, expected two dimensions; download the model again")
        return shape[0], shape[1]

    def _bits(self, words: int, codes: int, field: str) -> int:
        """How many a code has, of which so many are in so many words."""
        for bits in (4, 8):
            if words == _words(codes, bits):
                return bits
        raise self._error(
            f"{field} has {32 * words / codes:g} bits a weight; supported are 4 and 8; choose another quantisation of "
            "the model, or the original"
        )

    def _check_shape(self, field: str, expected: tuple[int, ...]) -> None:
        if self._has(field) and (got := self.files.shapes[f"{self.name}.{field}"]) != expected:
            raise self._error(
                f"{field} has shape {list(got)}, expected {list(expected)} beside the layer's other tensors; the file "
                "is damaged, download it again"
            )

    def _check_type(self, field: str, expected: Collection[str]) -> None:
        if self._has(field) and (got := self.files.types[f"{self.name}.{field}"]) not in expected:
            raise self._error(f"{field} is stored as {got}, expected {' or '.join(expected)}; it is of another format")

    def _error(self, text: str) -> CheckpointError:
        first = next(name for name in self.files.shapes if name.startswith(f"{self.name}."))
        return CheckpointError(f"{self.files.paths[first]}: quantised layer {self.name}: {text}")


def _in_blocks(groups: NDArray[np.int64]) -> bool:
    """Whether the inputs are whole blocks, each of one group."""
    return len(groups) % BLOCK == 0 and bool((groups.reshape(-1, BLOCK) == groups[::BLOCK, None]).all())


class _Transposed(Layer):
    """Tensors have the outputs as their last dimension."""

    def _scales(self) -> Floats:
        return self.files.read(f"{self.name}.{self.SCALES}").numpy().T


class GptqLayer(_Transposed):
    """A word has neighbouring inputs of one output, a word of zeros neighbouring outputs. Zeros are stored as they are:
    the second version of the format."""

    subtracted: ClassVar[int] = 0
    """From each zero when it was stored."""

    def _measure(self) -> tuple[int, int, int, int]:
        (words, outputs), (groups, _) = self._shape(self.CODES), self._shape(self.SCALES)
        bits = self._bits(self._shape(self.ZEROS)[1], outputs, f"{self.ZEROS} beside {self.CODES}")
        self._check_shape(self.SCALES, (groups, outputs))
        self._check_shape(self.ZEROS, (groups, _words(outputs, bits)))
        return outputs, words * 32 // bits, groups, bits

    def _codes(self, rows: slice) -> Codes:
        words = self._stored(self.CODES, ALL, rows)
        return _unpacked(words, self.bits).transpose(1, 0, 2).reshape(-1, self.inputs)

    def _zeros(self) -> Codes:
        words = self._stored(self.ZEROS)
        # The packed number was subtracted from the packed zeros, so that a zero of 0 borrows from the one above it.
        ones = np.int32(sum(self.subtracted << at for at in range(0, 32, self.bits)))
        return _unpacked(words + ones, self.bits).reshape(self.groups, -1)[:, : self.outputs].T


class FirstGptqLayer(GptqLayer):
    """The first version."""

    subtracted = 1


class AwqLayer(_Transposed):
    """A word has 8 neighbouring outputs of one input, the even ones before the odd ones; the layout "gemm"."""

    def _measure(self) -> tuple[int, int, int, int]:
        (inputs, words), (groups, outputs) = self._shape(self.CODES), self._shape(self.SCALES)
        bits = self._bits(words, outputs, f"{self.CODES} beside {self.SCALES}")
        if bits != 4:
            raise self._error(f"{self.CODES} has {bits} bits a weight; supported are 4 of AWQ; choose another model")
        self._check_shape(self.ZEROS, (groups, words))
        return outputs, inputs, groups, bits

    def _codes(self, rows: slice) -> Codes:
        start, stop, _ = rows.indices(self.outputs)
        words = slice(start // 8, -(-stop // 8))
        first = 8 * words.start
        return _evens_first(self._stored(self.CODES, ALL, words))[start - first : stop - first]

    def _zeros(self) -> Codes:
        return _evens_first(self._stored(self.ZEROS))


def _evens_first(words: Words) -> Codes:
    """words: [k, n / 8] -> [n, k]."""
    return _unpacked(words, 4)[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1).T


class PackedLayer(Layer):
    """The format "pack-quantized" of compressed-tensors: words have neighbouring inputs of one output, words of zeros
    neighbouring outputs. Zeros are there if they are not all in the middle; older files have each in a byte, less the
    middle."""

    CODES = "weight_packed"
    SCALES = "weight_scale"
    ZEROS = "weight_zero_point"
    INPUT_GROUPS = "weight_g_idx"
    SHAPE = "weight_shape"
    NEEDED = ("weight_packed", "weight_scale", "weight_shape")

    def _check_type(self, field: str, expected: Collection[str]) -> None:
        super()._check_type(field, [*expected, "I8"] if field == self.ZEROS else expected)

    def _measure(self) -> tuple[int, int, int, int]:
        (rows, words), (_, groups) = self._shape(self.CODES), self._shape(self.SCALES)
        self._check_type(self.SHAPE, ["I64", "I32"])
        self._check_shape(self.SHAPE, (2,))
        outputs, inputs = map(int, self._stored(self.SHAPE))
        if inputs < 1 or outputs != rows:
            raise self._error(
                f"{self.SHAPE} is {[outputs, inputs]}, {self.CODES} has shape {[rows, words]}; expected as many rows; "
                "the file is damaged, download it again"
            )
        bits = self._bits(words, inputs, self.CODES)
        self._check_shape(self.SCALES, (outputs, groups))
        in_bytes = self.files.types.get(f"{self.name}.{self.ZEROS}") == "I8"
        self._check_shape(self.ZEROS, (outputs if in_bytes else _words(outputs, bits), groups))
        return outputs, inputs, groups, bits

    def _codes(self, rows: slice) -> Codes:
        words = self._stored(self.CODES, rows)
        return _unpacked(words, self.bits).reshape(-1, words.shape[1] * 32 // self.bits)[:, : self.inputs]

    def _zeros(self) -> Codes:
        if not self._has(self.ZEROS):
            return np.full((self.outputs, self.groups), self.middle, np.uint8)
        stored = self._stored(self.ZEROS)
        if stored.dtype == np.int8:
            return stored.view(np.uint8) + np.uint8(self.middle)  # modulo 256
        return _unpacked(stored, self.bits).transpose(0, 2, 1).reshape(-1, self.groups)[: self.outputs]

    def _scales(self) -> Floats:
        return self.files.read(f"{self.name}.{self.SCALES}").numpy()
