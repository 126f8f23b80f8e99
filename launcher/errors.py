"""A user's mistake, met before anything was started; the launcher may import nothing of ours."""

from __future__ import annotations


class LaunchError(Exception):
    """What is wrong, where, and what to do next; ends with status 2."""
