"""What a script says when its input is wrong: one sentence, exit code 2, no traceback.

Run     uv run python implementations/lab/command_line.py
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the ValueError or OSError of a mistake into `error: ...` on stderr and exit code 2."""
    try:
        yield
    except OSError as problem:
        named = problem.strerror and problem.filename
        fail(f"{problem.filename}: {problem.strerror}" if named else str(problem))
    except ValueError as problem:
        fail(str(problem))


def fail(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    try:
        with clear_errors():
            raise ValueError("attention needs at least one head, got 0")
    except SystemExit as leaving:
        print(f"the sentence went to stderr; the exit code is {leaving.code}")


if __name__ == "__main__":
    main()
