"""Every Python block of README.md, notes/ and the weeks' READMEs is a test.

The blocks of a document share their names, and each runs those above it first: one block alone, or
a document spread over several pytest workers, does what the whole document does. A block seeds
itself, so that a reader who copies it sees what the test saw. Nothing else is decided here: a
reader's block is run as it stands, and only tests/ has fixtures.
"""

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

# A script is run by its own test; one named two_sample_test.py would otherwise be taken for a test.
collect_ignore_glob = ["weeks/*.py"]

run_block = PythonEvaluator()


def run_after_those_above(example: Example) -> None:
    """Run every block up to this one that has not run yet."""
    __tracebackhide__ = True  # a failure shows the document, not this
    ran = example.namespace.setdefault("__ran__", set())
    for block in example.document.examples():
        if block.start <= example.start and block.start not in ran:
            ran.add(block.start)
            run_block(block)


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser("python", run_after_those_above)],
    patterns=["README.md", "notes/*.md"],
).pytest()
