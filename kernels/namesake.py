"""What `import kernels` gets where Python looks into a clone first, as `python -m` does there.

transformers asks for Hugging Face's package of that name. Ours under a second name would register
every operation once more, and torch would go on with handles to the freed first ones: wrong answers
and crashes, now and then. So the real package comes forward where it is installed; otherwise
`kernels` stays an empty module, which transformers takes for none.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path


def give_way(name: str, folder: str) -> None:
    """Put the package `name` from outside of `folder`'s parent into sys.modules, if any."""
    clone = Path(folder).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != clone]
    spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
    if spec is not None and spec.loader is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
