"""The sigmoid loss: torch's binary cross-entropy, transformers' SigLIP, two pairs by hand."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, normalize
from torch.testing import assert_close

from implementations.contrastive.sigmoid_loss import SigmoidLoss, sigmoid_loss
from implementations.lab.compare import assert_same_function


def pair(count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, count, dim, dtype=torch.float64))


@pytest.mark.parametrize("count, dim", [(1, 3), (2, 1), (17, 8)])
def test_is_torchs_binary_cross_entropy(count, dim):
    def by_torch(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        scores = 5 * normalize(image) @ normalize(text).T - 3
        target = torch.eye(count, dtype=torch.float64)
        return binary_cross_entropy_with_logits(scores, target, reduction="sum") / count

    assert_same_function(lambda a, b: sigmoid_loss(a, b, 5.0, -3.0), by_torch, *pair(count, dim))


def test_is_transformers_siglip():
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = {**sizes, "vocab_size": 20, "max_position_embeddings": 4, "eos_token_id": 1}
    image = {**sizes, "image_size": 8, "patch_size": 4}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=image)).double()
    model.logit_scale.data.fill_(math.log(3.0))
    model.logit_bias.data.fill_(-2.0)
    theirs = model(
        input_ids=torch.randint(20, (5, 4)),
        pixel_values=torch.randn(5, 3, 8, 8, dtype=torch.float64),
        return_loss=True,
    )
    ours = sigmoid_loss(theirs.image_embeds, theirs.text_embeds, 3.0, -2.0)
    assert_close(ours, theirs.loss, rtol=1e-10, atol=0)


def test_two_pairs_by_hand():
    """Perpendicular pictures with their own texts: two yes at t + b, two no at b."""
    x = torch.eye(2, dtype=torch.float64)
    by_hand = 2 * math.log1p(math.exp(-(4 - 1))) + 2 * math.log1p(math.exp(-1))
    assert_close(sigmoid_loss(x, x, 4.0, -1.0).item(), by_hand / 2, rtol=1e-12, atol=0)


def test_a_batch_can_be_cut_anywhere():
    """Rows of one half against columns of the other add up: no row knows of another."""
    image, text = pair(6, 4)
    halves = zip(image.split(3), text.split(3), strict=True)
    corners = sum(3 * sigmoid_loss(i, t) for i, t in halves)
    crossed = 0.0
    for i, t in ((image[:3], text[3:]), (image[3:], text[:3])):
        scores = 10 * normalize(i) @ normalize(t).T - 10
        crossed += torch.nn.functional.softplus(scores).sum()
    assert_close(6 * sigmoid_loss(image, text), corners + crossed, rtol=1e-10, atol=0)


def test_the_learned_form_starts_where_the_paper_does():
    loss, (image, text) = SigmoidLoss().double(), pair(4, 3)
    assert_close(loss(image, text), sigmoid_loss(image, text, 10.0, -10.0), rtol=1e-6, atol=0)
    loss(image, text).backward()
    assert loss.log_scale.grad != 0 and loss.bias.grad != 0


def test_gradients_are_those_of_finite_differences():
    scale, bias = (torch.tensor(x, dtype=torch.float64).requires_grad_() for x in (3.0, -1.0))
    image, text = (x.requires_grad_() for x in pair(3, 4))
    assert torch.autograd.gradcheck(sigmoid_loss, (image, text, scale, bias))


@pytest.mark.parametrize(
    "image, text, scale, sentence",
    [
        (torch.ones(0, 3), torch.ones(0, 3), 1.0, "shapes .* agree"),
        (torch.ones(4, 3), torch.ones(3, 3), 1.0, "shapes .* agree"),
        (torch.ones(4, 3), torch.ones(4, 3), 0.0, "scale is positive, got 0.0"),
        (torch.ones(4, 3), torch.zeros(4, 3), 1.0, "no direction"),
        (torch.ones(4, 3), torch.full((4, 3), math.nan), 1.0, "not finite"),
    ],
)
def test_bad_input(image, text, scale, sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        sigmoid_loss(image, text, scale)
