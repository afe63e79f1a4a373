"""The one kind of error a user can mend."""


class InputError(ValueError):
    """Something given to the package cannot be used; the message says what was found and what to do.

    On the ``anomalib`` command line it is printed as its sentence alone, without a stack trace.

    Example:
        >>> raise InputError("sigma must not be negative, got -1.")
        Traceback (most recent call last):
        ...
        anomalib_clipad.errors.InputError: sigma must not be negative, got -1.
    """

    latest: "InputError | None" = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        # The command line's parser swallows errors of the classes it builds and retells them in its own words.
        InputError.latest = self
