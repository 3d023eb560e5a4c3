"""The exceptions a user can meet. Each message says what must be true, what was given, what to do."""


class InputError(ValueError):
    """Something the user gave cannot be used: exit code 2 before a sweep starts, a failed cell after."""


class StoreError(InputError):
    """Storage elsewhere did not do what was asked: the address may be wrong, or it may do it later."""


class TrialError(RuntimeError):
    """A trial cannot go on (a loss that is not finite, a budget that cannot hold): its cell fails."""


class TrackingError(RuntimeError):
    """The tracking server failed in mid-sweep: the sweep stops, and goes on from the results on disk."""


class ClusterError(RuntimeError):
    """Ray itself died in mid-sweep: the sweep stops, and goes on from the results on disk."""


class SweepInterrupted(RuntimeError):
    """The sweep was asked to stop; what is finished is kept and the same command goes on."""


# What the command line ends with: all is done; some of it failed; bad input, nothing was started; the disk is full;
# stopped; whoever read its output along left.
EXIT_OK, EXIT_FAILED_CELLS, EXIT_BAD_INPUT, EXIT_NO_SPACE, EXIT_INTERRUPTED, EXIT_PIPE = 0, 1, 2, 4, 130, 141
