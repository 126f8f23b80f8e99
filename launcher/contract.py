"""What the launcher and the ranks must agree on: variables, files, exit statuses and ports.

The ranks use this module too (clue_ds/dist.py and clue_ds/job), so each name and number is written
once. Like the rest of the launcher it imports only the standard library.
"""

from __future__ import annotations

import zlib

# Variables that the launcher sets for the ranks.
JOB_DIR_VARIABLE = "CLUE_DS_JOB_DIR"  # directory in which ranks and launcher exchange files
HOSTS_VARIABLE = "CLUE_DS_HOSTS"  # host:ranks,host:ranks in the order of the ranks
MAX_RESTARTS_VARIABLE = "CLUE_DS_MAX_RESTARTS"

# Files in that directory. A rank that ends well leaves FINISHED-n or STOPPED-n.
FINISHED, STOPPED = "finished", "stopped"
VERDICT_FILE = "verdict.json"  # the diagnosis of a job that failed
STOP_FILE = "stop"  # asks the ranks to save and stop
END_FILE = "end"  # the launcher is ending the job: a rank that gets TERM ends at once

# Exit statuses; sysexits.h begins at 64. `clue-ds launch --help` explains them.
STATUS_USER_ERROR = 2
STATUS_EXCEPTION = 70
STATUS_DIED = 71
STATUS_HANG = 72
STATUS_UNREACHABLE = 73
STATUS_STOPPED = 75  # saved and stopped on request: start again to continue (EX_TEMPFAIL)
STATUS_NO_PROGRESS = 93  # too many restarts in a row without a new checkpoint

# Ports below the range from which kernels choose the ports of outgoing connections.
FIRST_PORT, NUM_PORTS = 20_000, 12_000


def port_offset(seed: str) -> int:
    """A number below NUM_PORTS that follows from `seed`, so that jobs rarely get the same port."""
    return zlib.crc32(seed.encode()) % NUM_PORTS
