"""Row memories, by their kind. A new one is a file here and a line below."""

from .base import Memory
from .engram import EngramConfig
from .gemma_ple import GemmaPLEConfig
from .meki import MeKiConfig
from .ple import PLEConfig

MEMORIES: dict[str, type[Memory]] = {
    "engram": EngramConfig,
    "gemma_ple": GemmaPLEConfig,
    "meki": MeKiConfig,
    "ple": PLEConfig,
}
