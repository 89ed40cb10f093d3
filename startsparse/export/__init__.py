"""A finished run -> its tested network as a file that others can read.

``python -m startsparse.export RUN --format safetensors|csr|onnx [--compact]`` (`command`) writes
the network that `trained` reads from a run folder in one of the `formats`. `load` reads files of
the first two formats. `compact` removes dead units; `footprint` is what a network costs.
"""

from startsparse.export.formats import load, load_csr
from startsparse.export.trained import Trained, read_run

__all__ = ["Trained", "load", "load_csr", "read_run"]
