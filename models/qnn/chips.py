"""The chips that packages are compiled for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A Snapdragon and what the HTP compiler wants to know of it."""

    name: str
    soc_model: int
    """Qualcomm's number of the system on chip."""
    htp_arch: int
    """Version of the Hexagon Tensor Processor's instruction set."""
    vtcm_mb: int = 8
    """Tightly coupled memory of the HTP that a graph may use."""


CHIPS = {
    "sm8550": Chip("Snapdragon 8 Gen 2", 43, 73),
    "sm8650": Chip("Snapdragon 8 Gen 3", 57, 75),
    "sm8750": Chip("Snapdragon 8 Elite", 69, 79),
    "sm8850": Chip("Snapdragon 8 Elite Gen 5", 87, 81),
}
"""By the lower-case model number, which a phone's property ro.soc.model says in upper case."""
