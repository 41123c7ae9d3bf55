"""Graphs of a package for Qualcomm's NPUs: static ONNX stages and their ahead-of-time compilation (docs/qnn.md)."""
