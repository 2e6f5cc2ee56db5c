"""In: what a user got wrong.
Out: one exception type whose message is one clear line, naming the thing, its value and the remedy.
"""


class InputError(ValueError):
    """Report a mistake that a user can mend: a file, a flag or an argument."""
