"""The one error that a user is meant to read."""


class UserError(Exception):
    """Something that the user can mend, told in one line: what, where, what to do.

    Libraries raise it; only a command line translates it (one line on stderr, exit status 2).

    Args:
        what: what is wrong.
        where: the file, line, option or folder it concerns.
        remedy: what the user can do about it.
    """

    def __init__(self, what: str, where: object = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        line = self.what
        if self.where:
            line += f"（{self.where}）"
        if self.remedy:
            line += f"。{self.remedy}"
        # A message is one line, whatever a library's own text holds.
        return " ".join(line.split())
