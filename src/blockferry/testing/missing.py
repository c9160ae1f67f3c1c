"""What the test kit says when a component that it needs is not installed."""


class MissingComponentError(RuntimeError):
    """A program, kernel or package that the tests need is not there.

    Args:
        component: what is missing, with the place where it was looked for.
        remedy: the line that installs it, such as ``make setup``.
    """

    def __init__(self, component: str, remedy: str) -> None:
        super().__init__(f"{component} is missing; run: {remedy}")
        self.component = component
        self.remedy = remedy
