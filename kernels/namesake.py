"""What `import kernels` imports where a clone of this repository is first on sys.path.

That is so for `python -m` in the clone. transformers imports Hugging Face's package of the name
`kernels`. Were ours imported under this second name, it would register every operation again, and
torch would keep handles to the first registrations after they are freed, which sometimes gives
wrong results or crashes. So `import kernels` imports Hugging Face's package if it is installed.
Otherwise `kernels` is an empty module, which transformers treats as not installed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path


def give_way(name: str, folder: str) -> None:
    """If a package `name` lies outside the clone that `folder` is in, put it into sys.modules."""
    clone = Path(folder).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != clone]
    spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
    if spec is not None and spec.loader is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
