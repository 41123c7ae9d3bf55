"""Structured output: texts that a JSON schema, a regular expression or a grammar allows."""

from .grammars import Constraint, Grammars

__all__ = ["Constraint", "Grammars"]
