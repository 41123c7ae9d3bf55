"""The time of a fresh process to a model's first token, by part."""
