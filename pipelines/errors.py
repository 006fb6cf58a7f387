"""The two errors that an entry point turns into an exit code: the user's mistakes, and jobs that cannot go on."""


class UserError(Exception):
    """The user can correct this: bad configuration, bad input or unwritable output. Jobs exit with code 2."""


class JobFailedError(RuntimeError):
    """The job cannot go on and no image is the cause. Every committed part stays. Jobs exit with code 1."""
