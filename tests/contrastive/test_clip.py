"""CLIP: transformers' loss and model, both directions, the temperature's bound, text towers."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from implementations.contrastive.clip import CLIP, TextTower, clip_loss, pair_loss
from implementations.contrastive.info_nce import info_nce
from implementations.lab.compare import assert_same_function
from implementations.models.decoder import DecoderConfig
from implementations.training.accumulation import IGNORED

TINY = DecoderConfig(vocabulary=11, width=8, layers=2, heads=2, hidden=16, positions=6)


def small(temperature: float = 0.07) -> CLIP:
    """Linear towers on pictures of 2x2 and on vectors of 3."""
    return CLIP(nn.Flatten(), nn.Identity(), 12, 3, dim=5, temperature=temperature).double()


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.rand(count, 3, 2, 2, dtype=torch.float64)
    return pixels, torch.randn(count, 3, dtype=torch.float64)


def test_loss_is_transformers():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    def theirs(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        image, text = image / image.norm(dim=1)[:, None], text / text.norm(dim=1)[:, None]
        return image_text_contrastive_loss(text @ image.T / 0.2)

    inputs = torch.randn(2, 7, 5, dtype=torch.float64)
    assert_same_function(lambda a, b: clip_loss(a, b, 0.2), theirs, *inputs)


def test_model_is_transformers():
    """Their towers' vectors through our projections and temperature give their loss."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": 20,
        "max_position_embeddings": 4,
        "eos_token_id": 19,
        "bos_token_id": 18,
    }
    image = {**sizes, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=image, projection_dim=6)
    model = CLIPModel(config).double().eval()
    inputs = {
        "input_ids": torch.randint(19, (5, 4)).index_fill(1, torch.tensor([3]), 19),
        "pixel_values": torch.randn(5, 3, 8, 8, dtype=torch.float64),
    }
    theirs = model(**inputs, return_loss=True)
    pictures = model.vision_model(inputs["pixel_values"]).pooler_output[..., None, None]
    texts = model.text_model(inputs["input_ids"]).pooler_output
    ours = CLIP(nn.Flatten(), nn.Identity(), 16, 16, dim=6).double()
    ours.image_projection.weight.data.copy_(model.visual_projection.weight)
    ours.text_projection.weight.data.copy_(model.text_projection.weight)
    ours.log_scale.data.copy_(model.logit_scale)
    image, text = ours.embed_images(pictures), ours.embed_texts(texts)
    assert_close(image, theirs.image_embeds, rtol=1e-10, atol=1e-12)
    assert_close(text, theirs.text_embeds, rtol=1e-10, atol=1e-12)
    loss = clip_loss(image, text, ours.temperature())
    assert_close(loss, theirs.loss, rtol=1e-10, atol=0)


def test_both_directions_count_alike():
    """Texts that all look alike: pictures cannot choose, texts can; by hand for two pairs."""
    image = torch.eye(2, dtype=torch.float64)
    text = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    c = math.sqrt(0.5)
    rows = [math.log1p(math.exp(c - 1)), math.log1p(math.exp(0 - c))]  # cosines 1 c / 0 c
    columns = [math.log1p(math.exp(0 - 1)), math.log1p(math.exp(c - c))]
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert_close(clip_loss(image, text, 1.0).item(), expected, rtol=1e-12, atol=0)
    assert_close(clip_loss(image, text, 1.0), clip_loss(text, image, 1.0))
    assert abs(info_nce(image, text, 1.0) - info_nce(text, image, 1.0)) > 0.01


def test_the_temperature_starts_where_asked_and_is_learned():
    model = small(0.2)
    assert_close(model.temperature().item(), 0.2, rtol=1e-6, atol=0)
    model(*batch()).backward()
    slope = model.log_scale.grad.item()
    before = model(*batch()).item()
    assert slope != 0 and before > 0


def test_the_temperature_is_bounded_and_can_come_back():
    """A scale of 1,000 counts as 100; at the bound there is a gradient, and it leads away again."""
    model = small()
    model.log_scale.data.fill_(math.log(1000.0))
    pixels, text = batch()
    loss = model(pixels, text)
    assert_close(model.temperature().item(), 0.01, rtol=1e-6, atol=0)
    loss.backward()
    assert model.log_scale.grad > 0  # random pairs: being so sure is wrong
    torch.optim.SGD([model.log_scale], lr=0.01).step()
    assert model.temperature() > 0.0101


def test_embeddings_have_length_one():
    model, (pixels, text) = small(), batch()
    for x in (model.embed_images(pixels), model.embed_texts(text)):
        assert_close(x.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_every_parameter_learns():
    model = CLIP(nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), TextTower(TINY), 6, 8, dim=5)
    tokens = torch.randint(11, (4, 6))
    model(torch.rand(4, 3, 2, 2), tokens).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_the_training_loss_is_the_mean_times_the_pairs():
    model, given = small(), batch()
    total, count = pair_loss(model, given)
    assert count == 4
    assert_close(total / 4, model(*given), rtol=1e-10, atol=0)


def test_padding_changes_no_text():
    """A text alone equals itself beside a longer one; its last token is what counts."""
    tower = TextTower(TINY).double()
    short, long = torch.tensor([[3, 1]]), torch.tensor([[3, 1, 4, 1, 5]])
    padded = torch.cat([torch.tensor([[3, 1] + [IGNORED] * 3]), long])
    both = tower(padded)
    assert_close(both[:1], tower(short), rtol=1e-10, atol=1e-12)
    assert_close(both[1:], tower(long), rtol=1e-10, atol=1e-12)
    hidden = tower.decoder.hidden(long)
    assert_close(both[1], hidden[0, -1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(tower(torch.tensor([[3, 1]])), tower(torch.tensor([[1, 1]])))


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: small(temperature=0.001), "at least 0.01, got 0.001"),
        (lambda: small(temperature=math.nan), "got nan"),
        (lambda: small()(*batch(1)), "undefined for 1"),
        (lambda: TextTower(TINY)(torch.tensor([[3, 1], [IGNORED] * 2])), "text 1 has no token"),
        (lambda: TextTower(TINY)(torch.ones(1, 7, dtype=torch.long)), "at most 6 tokens"),
        (lambda: small().embed_texts(torch.zeros(2, 3).double()), "no direction"),
    ],
)
def test_bad_input(call, sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        call()
