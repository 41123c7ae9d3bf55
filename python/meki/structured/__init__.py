"""Structured output: texts that a JSON schema, a regular expression or a grammar allows."""

from .grammars import WHITESPACE, Constraint, Grammars

__all__ = ["WHITESPACE", "Constraint", "Grammars"]
