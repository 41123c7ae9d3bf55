"""ONNX graphs of decoders, written from their programs: primitives.py is what programs are written against."""
