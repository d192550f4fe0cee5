"""The one exception whose message is meant for the user: it says what is wrong and names the remedy."""


class UserError(Exception):
    """Wrong input, not a defect: commands print its message alone, without a traceback, and exit with status 2."""
