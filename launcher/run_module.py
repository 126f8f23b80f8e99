"""run_module.py MODULE ARGUMENTS...: what `python -m MODULE ARGUMENTS...` does, as a script.

DeepSpeed's slurm launcher starts scripts only. Guarantees: USR1, which a batch system may send
while Python is still importing, is ignored until the module has a handler for it.
"""

from __future__ import annotations

import runpy
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
