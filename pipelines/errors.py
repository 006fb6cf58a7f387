"""What a user can cause, and what ends a job: the two errors that reach an entry point."""


class UserError(Exception):
    """Something the user can correct: bad configuration, bad input, unwritable output. Jobs exit with code 2."""


class JobFailedError(RuntimeError):
    """The job cannot go on and the images are not to blame; everything committed is kept."""
