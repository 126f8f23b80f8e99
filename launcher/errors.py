"""The launcher's error class, because the launcher may not import clue_ds.errors."""

from __future__ import annotations


class LaunchError(Exception):
    """A user's mistake, found before anything was started. The exit status is 2.

    The message is what is wrong, where, and what to do next.
    """
