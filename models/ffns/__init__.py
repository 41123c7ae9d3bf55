"""Feed-forward networks, by their kind. A new one is a file here and a line below.

Each is a PyTorch module made with (inputs, width, outputs), [.., inputs] -> [.., outputs], with a static method
`program(g, h, prefix, width, outputs)` that computes the same over graph primitives, `hidden_act`, what Hugging Face
calls it, and `RESIDUAL`, how names of its weights end that write to the residual stream.
"""

from .swiglu import SwiGLU

FFNS = {"swiglu": SwiGLU}
