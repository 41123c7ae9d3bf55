"""Graphs of a package for Qualcomm's NPUs: static ONNX stages and their ahead-of-time compilation (docs/qnn.md)."""


class CompileError(RuntimeError):
    """A model, or a stage of it, that cannot run on the NPU, or that the compiler does not compile."""
