"""The ways in which redpeft fails on purpose; anything else is a bug."""


class UserError(ValueError):
    """The caller's input is wrong. The message says in one line what is wrong and what to do; commands exit with 2."""


class RunError(RuntimeError):
    """The work itself failed (a loss that is not finite, a full disk). Commands exit with 1; a run can be resumed."""


class Stopped(RunError):
    """The run was told to stop (SIGTERM) and has kept what it did. Runs that would come after it do not start."""
