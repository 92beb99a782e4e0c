"""What a script says when its input is wrong: one sentence, exit code 2, no traceback.

A reader that has seen enough (`... | head -1`) is no mistake: the script stops without a word. Nor
is Ctrl-C: one word, and exit code 130.

Run     uv run python implementations/lab/command_line.py
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the ValueError or OSError of a mistake into `error: ...` on stderr and exit code 2.

    Ctrl-C says `stopped` and leaves with 130, as shells do.
    """
    try:
        yield
        sys.stdout.flush()  # here and not at exit, where a broken pipe can no longer be caught
    except BrokenPipeError:
        # What is still buffered would raise once more at exit, so it goes nowhere (Python's manual,
        # "Note on SIGPIPE").
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
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
