"""Feed-forward networks, by their kind. A new one is a file here and a line below."""

from .base import FFN
from .geglu import GeGLUConfig
from .moe import MoEConfig
from .swiglu import SwiGLUConfig

FFNS: dict[str, type[FFN]] = {"swiglu": SwiGLUConfig, "geglu": GeGLUConfig, "moe": MoEConfig}
