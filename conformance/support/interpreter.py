"""The template of the code interpreter."""

from . import definitions

NAME = "code-interpreter-v1"


def template() -> None:
    """Builds it, or finds that nothing has changed."""
    definitions.build("code-interpreter", NAME, "--memory", "1024")


if __name__ == "__main__":
    template()
