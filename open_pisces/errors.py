"""The base class of every error that speaks to the user."""

from __future__ import annotations


class PiscesError(ValueError):
    """An expected error: the message names the thing, the value and the remedy.

    The command line prints it as one line and exits with code 2; a server answers 4xx. Catch it to tell bad input from
    a fault of the program. It is a `ValueError`, so code that catches those keeps working.
    """
