"""The outcomes of a command and the exceptions behind them.

A user's mistake is a ``ValueError`` (what was given, what is allowed, what to do). Two of the exceptions
here are for what is not the user's mistake.
"""

EXIT_DONE = 0
EXIT_USER_ERROR = 1
EXIT_CHECK_FAILED = 2
EXIT_INFRASTRUCTURE = 64
EXIT_UNFINISHED = 75
"""Training was interrupted and has saved its state: the same command continues. The number is ``EX_TEMPFAIL`` of
sysexits.h. torchrun and srun may leave with another one: ``runs.completeness`` tells what happened."""


class Refused(ValueError):
    """A file holds something that nothing of its kind needs: it was made so, rather than damaged. Exit code 1."""


class CheckFailed(Exception):
    """A comparison or an integrity check did not hold, or could not be made. Exit code 2."""


class InfrastructureError(Exception):
    """The machine, not the request, is at fault: a lost worker, a full disk. Exit code 64."""
