"""What 4-bit weights cost on an NPU: MatMulNBits against A16W4 QDQ, layer by layer, in the HTP simulator.

    python -m benchmarks.quality.qnn_precision models/meki-tiny-checkpoint TEXT \\
        --tokenizer models/packages/meki-tiny/tokenizer.json

Every linear layer of a checkpoint gets the inputs that it has in the text, and computes in three ways: with float16
weights; with MatMulNBits, weights of 4 bits in blocks of 32 with float16 inputs; and as QuantizeLinear and
DequantizeLinear around a MatMul, weights of 4 bits with one scale an output channel (the only granularity that it has
for them), inputs and outputs in 16 bits whose ranges are those of the text. The scales of both are searched for the
least squared error. The table has the RMS of the error relative to the RMS of the exact output.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tqdm import tqdm

from meki.bench.markdown import head, row
from meki.models.checkpoints.huggingface import load_model
from meki.models.graph.builder import GraphBuilder
from meki.models.qnn.chips import CHIPS
from meki.models.qnn.compiler import open_provider, provider_options

Floats = NDArray[np.float32]
BLOCK = 32


def quantize(weight: Floats, block: int) -> tuple[NDArray[np.int8], Floats]:
    """weight [n, k] -> q in -8 .. 7, int8 [n, k / block, block], and scales [n, k / block], of the least error."""
    blocks = weight.reshape(len(weight), -1, block)
    largest = np.abs(blocks).max(axis=-1)
    best, error = np.ones_like(largest), np.full(largest.shape, np.inf, np.float32)
    for divisor in np.arange(6.0, 16.1, 0.4, dtype=np.float32):
        scale = np.maximum(largest / divisor, 1e-8).astype(np.float16).astype(np.float32)
        scale = np.maximum(scale, np.float32(6e-8))
        q = np.clip(np.rint(blocks / scale[..., None]), -8, 7)
        got = np.square(blocks - q * scale[..., None]).sum(axis=-1)
        best, error = np.where(got < error, scale, best), np.minimum(got, error)
    return np.clip(np.rint(blocks / best[..., None]), -8, 7).astype(np.int8), best


def constant(graph: GraphBuilder, name: str, values: np.ndarray | np.generic) -> str:
    return graph.constant(numpy_helper.from_array(np.asarray(values, order="C"), name))


def to_float16(graph: GraphBuilder, x: str) -> str:
    return graph.op("Cast", [x], f"{x}.float16", to=TensorProto.FLOAT16)


def to_float32(graph: GraphBuilder, x: str) -> str:
    return graph.op("Cast", [x], f"{x}.float32", to=TensorProto.FLOAT)


def float16(graph: GraphBuilder, x: str, weight: Floats, _inputs: Floats, _outputs: Floats) -> str:
    product = graph.op("MatMul", [to_float16(graph, x), constant(graph, "w", weight.T.astype(np.float16))], "product")
    return to_float32(graph, product)


def matmul_nbits(graph: GraphBuilder, x: str, weight: Floats, _inputs: Floats, _outputs: Floats) -> str:
    q, scales = quantize(weight, BLOCK)
    codes = (q + np.int8(8)).astype(np.uint8)
    packed = constant(graph, "w", codes[..., ::2] | codes[..., 1::2] << 4)
    inputs = [to_float16(graph, x), packed, constant(graph, "scales", scales.astype(np.float16).reshape(-1))]
    rows, columns = weight.shape
    attributes = {"K": columns, "N": rows, "bits": 4, "block_size": BLOCK}
    return to_float32(graph, graph.op("MatMulNBits", inputs, "product", domain="com.microsoft", **attributes))


def qdq(graph: GraphBuilder, x: str, weight: Floats, inputs: Floats, outputs: Floats) -> str:
    def rounded(value: str, calibration: Floats) -> str:
        """To 16 bits and back, over the range of the calibration."""
        low, high = min(float(calibration.min()), 0.0), max(float(calibration.max()), 0.0)
        step = np.float32((high - low) / 65_535)
        step_name = constant(graph, f"{value}.step", step)
        zero = constant(graph, f"{value}.zero", np.uint16(np.rint(-low / step)))
        codes = graph.op("QuantizeLinear", [value, step_name, zero], f"{value}.codes")
        return graph.op("DequantizeLinear", [codes, step_name, zero], f"{value}.rounded")

    q, scales = quantize(weight, weight.shape[1])
    # An int4 weight without an explicit zero point is silently wrong on this provider.
    zero = graph.constant(helper.make_tensor("w.zero", TensorProto.INT4, [len(weight)], [0] * len(weight)))
    codes = q.reshape(weight.shape).T
    packed = graph.constant(helper.make_tensor("w.codes", TensorProto.INT4, codes.shape, codes.reshape(-1).tolist()))
    w = graph.op("DequantizeLinear", [packed, constant(graph, "w.scales", scales[:, 0]), zero], "w", axis=1)
    return rounded(graph.op("MatMul", [rounded(x, inputs), w], "product"), outputs)


KINDS: dict[str, Callable[[GraphBuilder, str, Floats, Floats, Floats], str]] = {
    "float16": float16,
    "MatMulNBits": matmul_nbits,
    "A16W4 QDQ": qdq,
}


def simulate(kind: str, weight: Floats, inputs: Floats, outputs: Floats, directory: Path) -> Floats:
    """The layer's outputs [T, n] for inputs [T, k]; `outputs` are the exact ones."""
    graph = GraphBuilder("com.microsoft")
    x = graph.input("x", (1, *inputs.shape))  # MatMulNBits is not placed with two dimensions
    y = KINDS[kind](graph, x, weight, inputs, outputs)
    graph.op("Identity", [y], graph.output("y", (1, *outputs.shape)))
    graph.save(directory / "layer.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(open_provider(), provider_options(CHIPS["sm8750"]))
    session = onnxruntime.InferenceSession(str(directory / "layer.onnx"), options)
    result: Floats = session.run(None, {"x": inputs[None]})[0][0]
    return result


def layer_inputs(checkpoint: Path, ids: list[int]) -> dict[str, tuple[Floats, Floats]]:
    """For each linear layer its weight [n, k] and its inputs [T, k] in the text."""
    model = load_model(checkpoint)[0]
    found: dict[str, tuple[Floats, Floats]] = {}

    def keep(name: str, module: torch.nn.Linear, x: torch.Tensor) -> None:
        found[name] = (module.weight.detach().numpy(), x.reshape(-1, x.shape[-1]).numpy().copy())

    for name, module in model.named_modules():
        # What makes the memory's rows is folded: it does not run on a phone.
        if isinstance(module, torch.nn.Linear) and "word_emb_projection" not in name:
            module.register_forward_hook(lambda module, x, _y, name=name: keep(name, module, x[0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.qnn_precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="Hugging Face folder, training form")
    parser.add_argument("text", type=Path, help="UTF-8 text")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--tokens", type=int, default=64, help="of the text (default: %(default)s)")
    args = parser.parse_args()
    onnxruntime.set_default_logger_severity(4)  # the provider warns about what it lacks on this machine
    ids = Tokenizer.from_file(str(args.tokenizer)).encode(args.text.read_text(encoding="utf-8")).ids[: args.tokens]
    errors: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, (weight, inputs) in tqdm(layer_inputs(args.checkpoint, ids).items(), file=sys.stderr, disable=None):
            exact = inputs @ weight.T
            for kind in KINDS:
                got = simulate(kind, weight, inputs, exact, Path(directory))
                error = float(np.sqrt(np.mean(np.square(got - exact)) / np.mean(np.square(exact))))
                errors.setdefault(name.split(".")[-1], {}).setdefault(kind, []).append(error)
    print(f"{len(ids)} tokens; relative RMS error of a layer's output, median over the layers\n")
    print(*head(["layer", *KINDS], "l"), sep="\n")
    for layer, kinds in errors.items():
        print(row([layer, *(f"{np.median(kinds[kind]):.5f}" for kind in KINDS)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
