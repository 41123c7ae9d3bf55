"""Continues a text with the bundled model."""

from meki import Engine

engine = Engine("meki-tiny")
result = engine.generate("Once upon a time", max_new_tokens=64, temperature=0)
print(result.text)
