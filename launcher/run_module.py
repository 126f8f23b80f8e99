"""run_module.py MODULE ARGUMENTS...: a script that does what `python -m MODULE ARGUMENTS...` does.

DeepSpeed's slurm launcher can only start scripts. Guarantees: USR1, which a batch system may send
while Python is still importing, is ignored until the module has installed a handler.
"""

from __future__ import annotations

import runpy
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
