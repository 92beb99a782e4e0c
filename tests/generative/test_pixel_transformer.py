"""Pictures as texts: tokens and back, an exact likelihood, and writing with a cache."""

import torch

from implementations.generative.pixel_transformer import (
    decoder_of,
    pictures_of,
    pixel_loss,
    tokens_of,
    write,
)


def test_tokens_and_back():
    pixels = torch.tensor([-1.0, -0.4, 0.3, 1.0]).reshape(1, 1, 2, 2)
    tokens = tokens_of(pixels, torch.tensor([2]), 4)
    assert tokens.tolist() == [[6, 0, 1, 2, 3]]
    again = pictures_of(tokens[:, 1:], 2, 4)
    torch.testing.assert_close(again.flatten(), torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))


def test_probabilities_of_all_pictures_sum_to_one():
    """Every picture of 2 x 2 pixels in two shades, given a label; labels cost the rest."""
    decoder = decoder_of(2, 2, 1, 32, 1).double().eval()
    every = torch.cartesian_prod(*[torch.arange(2)] * 4)
    tokens = torch.cat((torch.full((16, 1), 2), every), 1)
    with torch.no_grad():
        losses = torch.stack([pixel_loss(decoder, row[None])[0] for row in tokens])
        label = decoder(tokens[:, :-1]).softmax(-1)[..., 2]
    assert pixel_loss(decoder, tokens)[1] == 64
    total = (-losses.double()).exp().sum()
    # What is missing from one was given to the word for the label, at each pixel.
    assert 0.05 < total < 1 and label.min() > 0
    torch.testing.assert_close(
        pixel_loss(decoder, tokens)[0].double(), losses.double().sum(), rtol=1e-5, atol=0
    )


def test_writing_follows_the_decoder():
    """A decoder that always expects the same shade writes it."""
    decoder = decoder_of(3, 4, 2, 32, 1)
    with torch.no_grad():
        decoder.embedding.weight.zero_()
        decoder.embedding.weight[:, 0] = torch.tensor([0.0, 0, 9, 0, 1, 1])
        decoder.norm.weight.fill_(9.0)
    greys = write(decoder, torch.tensor([0, 1]), 4, torch.Generator().manual_seed(0))
    assert greys.shape == (2, 9) and (greys == 2).double().mean() > 0.9
