"""The layout onnx: the network as one ONNX file, and its int8 form.

graph.py has the network's operations, file.py writes them with the weights, layout.py writes and
checks the directory, quantize.py makes the int8 form and measures what it changes.
"""

from __future__ import annotations

DEFAULT_OPSET = 17
