"""Pictures with names, ready for two towers: OpenMoji's pixels as floats, names as numbers.

    split_pictures   training and test pictures that share no family; in the test one of each
    minilm_reader    names -> vectors of MiniLM, which is frozen
    scratch_reader   names -> byte pairs, learned from the training names, for a tower to be trained

Variants of one picture (a cook, a man who cooks) are drawn nearly alike. On both sides of the split
they would be the answer to the test, and twice in the test they would be each other's mistake.

Data    OpenMoji, CC BY-SA 4.0, see sources/openmoji.py
Shapes  pixels [picture, 3, row, column] in [0, 1]
Run     uv run python implementations/contrastive/named_pictures.py
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from implementations.models.encoder import Encoder
from implementations.sources.openmoji import OpenMoji, openmoji
from implementations.sources.weights import minilm_tokenizer
from implementations.text.byte_pair_encoding import train as learn_byte_pairs
from implementations.training.accumulation import IGNORED

Reader = Callable[[Sequence[str]], Tensor]

MERGES, LONGEST = 600, 24  # byte pairs that are learned, and tokens of a name that are read
AT_ONCE = 64  # names in a batch of MiniLM's

read_once = cache(openmoji)  # the catalogue and 14 languages take half a second


def split_pictures(size: int = 32, count: int | None = None) -> tuple[OpenMoji, OpenMoji]:
    """OpenMoji's training pictures, and of its test pictures the first of each family.

    Args:
        count: about so many of both together, evenly over the catalogue; all unless given.

    Raises:
        ValueError: fewer pictures than can be split, or `check_apart`'s.
    """
    emoji = read_once(size)
    if count is not None:
        if not 20 <= count <= len(emoji.codes):
            raise ValueError(f"from 20 to {len(emoji.codes)} pictures can be split, got {count}")
        emoji = emoji.at(torch.linspace(0, len(emoji.codes) - 1, count).long())
    train, test = emoji.split()
    _, first = np.unique(test.family.numpy(), return_index=True)
    test = test.at(torch.from_numpy(np.sort(first)))
    check_apart(train, test)
    return train, test


def check_apart(train: OpenMoji, test: OpenMoji) -> None:
    """The leak check: raise ValueError if a test picture, or a variant of it, is in training.

    By its family, and by its pixels, should a family have been overlooked.
    """
    shown = {picture.tobytes() for picture in train.pixels.numpy()}
    families = set(train.family.tolist())
    for code, family, picture in zip(
        test.codes, test.family.tolist(), test.pixels.numpy(), strict=True
    ):
        if family in families or picture.tobytes() in shown:
            raise ValueError(f"test picture {code} leaks: training holds it, or a variant of it")


def as_floats(emoji: OpenMoji) -> Float[Tensor, "picture 3 row column"]:
    """Pixels from 0 to 1."""
    return emoji.pixels.float() / 255


def minilm_reader() -> Reader:
    """Reads names as MiniLM's sentence vectors [name, 384]; Apache-2.0, trained on English."""
    encoder, tokenizer = Encoder.from_minilm(), minilm_tokenizer()

    def read(names: Sequence[str]) -> Float[Tensor, "name width"]:
        order = sorted(range(len(names)), key=lambda i: len(names[i]))  # little padding
        vectors = torch.empty(len(names), encoder.config.width)
        for start in range(0, len(order), AT_ONCE):
            chosen = order[start : start + AT_ONCE]
            vectors[chosen] = encoder.embed([names[i] for i in chosen], tokenizer)
        return vectors

    return read


def scratch_reader(names: Sequence[str]) -> Reader:
    """Reads names as token ids [name, LONGEST], padded with -100; a longer name is cut.

    Args:
        names: what the byte pairs are learned from: training names only.
    """
    tokenizer = learn_byte_pairs("\n".join(names), MERGES)

    def read(names: Sequence[str]) -> Int[Tensor, "name token"]:
        rows = torch.full((len(names), LONGEST), IGNORED)
        for row, name in zip(rows, names, strict=True):
            ids = tokenizer.encode(name, special=False)[:LONGEST]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    return read


def main() -> None:
    train, test = split_pictures()
    print(f"{len(train.codes):,} pictures to train on, {len(test.codes)} to test, none in both")
    read = scratch_reader(train.names["en"])
    lengths = (read(test.names["en"]) != IGNORED).sum(1).double()
    letters = np.mean([len(name.encode()) for name in test.names["en"]])
    print(f"test names: {letters:.1f} bytes, {lengths.mean():.1f} tokens on average")
    few = test.names["en"][:40]
    vectors = minilm_reader()(few)
    nearest = (vectors @ vectors.T).fill_diagonal_(-1).argmax(1).tolist()
    for i in (0, 15, 30):
        print(f"  to MiniLM {few[i]!r} is most like {few[nearest[i]]!r}")


if __name__ == "__main__":
    main()
