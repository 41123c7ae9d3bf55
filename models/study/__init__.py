"""Configurations trained on the same tokens in the same order, and what they have come to: the command meki-study."""
