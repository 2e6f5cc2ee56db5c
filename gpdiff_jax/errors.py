"""In: what a user got wrong.
Out: exceptions whose message is one clear line, naming the thing, its value and the remedy.
"""


class InputError(ValueError):
    """Report a mistake that a user can mend: a file, a flag or an argument."""


class NotFiniteError(InputError, FloatingPointError):
    """Report a training that left the numbers: its learning rate is a user's to lower."""
