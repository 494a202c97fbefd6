"""The one error of this package that is the user's to mend."""


class DataError(ValueError):
    """Data that is missing, does not fit the config, or is too damaged to go on.

    The message is one clear sentence.
    """
