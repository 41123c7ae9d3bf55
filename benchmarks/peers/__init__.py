"""Prefill and decode beside other engines."""
