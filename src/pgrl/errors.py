"""The errors that are the user's to solve."""


class UserError(Exception):
    """A mistake of the user: the message is one screen naming key, value, reason and a command that works."""


class NonFiniteError(ArithmeticError):
    """Something became NaN or infinite: the run stops before such weights are saved."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, foreign or missing, and is therefore not used."""
