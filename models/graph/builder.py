"""An ONNX graph under construction, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, ValueInfoProto, helper

_IR_VERSION = 11  # came with opset 23
_OPSET = 23  # the first with RMSNormalization


class GraphBuilder:
    """Methods add nodes; values go by name. `domains`: of operators that are not ONNX's own, each in its version 1."""

    def __init__(self, *domains: str) -> None:
        self.opsets = [helper.make_opsetid("", _OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.inputs: dict[str, ValueInfoProto] = {}
        self.outputs: dict[str, ValueInfoProto] = {}

    def op(
        self, kind: str, inputs: Sequence[str], outputs: str | Sequence[str], /, domain: str = "", **attributes: Any
    ) -> str:
        """Adds a node and returns its first output."""
        outputs = [outputs] if isinstance(outputs, str) else list(outputs)
        node = helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.nodes.append(node)
        return outputs[0]

    def input(self, name: str, shape: Sequence[int | str], data_type: int = TensorProto.FLOAT) -> str:
        self.inputs[name] = helper.make_tensor_value_info(name, data_type, shape)
        return name

    def output(self, name: str, shape: Sequence[int | str], data_type: int = TensorProto.FLOAT) -> str:
        self.outputs[name] = helper.make_tensor_value_info(name, data_type, shape)
        return name

    def constant(self, tensor: TensorProto) -> str:
        self.initializers[tensor.name] = tensor
        return tensor.name

    def save(self, path: Path) -> None:
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            list(self.inputs.values()),
            list(self.outputs.values()),
            list(self.initializers.values()),
        )
        model = helper.make_model(graph, opset_imports=self.opsets, ir_version=_IR_VERSION, producer_name="meki")
        onnx.save(model, path)
