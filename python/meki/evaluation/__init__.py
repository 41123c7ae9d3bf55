"""How good a model is, measured through the engine."""
