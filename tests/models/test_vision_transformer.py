"""The vision transformer against transformers' ViT, both ways; what each position must know."""

import pytest
import safetensors.torch
import torch
from transformers import ViTForImageClassification, ViTModel

from implementations.attention.vendor import attention_sdpa
from implementations.layers.patch_embedding import join_patches, split_patches
from implementations.models.vision_transformer import VisionTransformer, ViTConfig
from implementations.models.vit_in_transformers import vit_config

POSITIONS = ("learned", "sinusoidal", "rotary", "none")
SMALL = {"image": 16, "patch": 4, "width": 32, "layers": 2, "heads": 4, "hidden": 48}
SIZES = {
    "small": SMALL,
    "grey, deep": SMALL | {"channels": 1, "layers": 5, "heads": 2, "epsilon": 1e-6},
    "large patches": SMALL | {"image": 42, "patch": 14, "width": 48, "heads": 6},
}


def ours(**changes):
    return VisionTransformer(ViTConfig(**(SMALL | changes))).eval()


def theirs(config, kind=ViTModel, **options):
    """Transformers' model of the same sizes, every weight random: theirs start some at zero."""
    model = kind(vit_config(config, attn_implementation="eager"), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def saved(model, folder):
    """The weights under the names of a published file, as save_pretrained writes one."""
    model.save_pretrained(folder)
    return safetensors.torch.load_file(folder / "model.safetensors")


def pixels_for(config, batch=2, size=None):
    return torch.randn(batch, config.channels, *(size or (config.image, config.image)))


def largest(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# Three configurations, both ways. 1e-5 of the largest feature is the demand; two orders of
# operations in float32 (eps 6e-8) through five blocks measure 1e-6.


@pytest.mark.parametrize("name", SIZES)
def test_equals_transformers_with_their_weights(name, tmp_path):
    """Their file, as save_pretrained writes it, loaded strictly here: all tokens agree."""
    config = ViTConfig(**SIZES[name])
    reference = theirs(config, add_pooling_layer=False)
    model = VisionTransformer(config).load_published(saved(reference, tmp_path))
    pixels = pixels_for(config)
    with torch.no_grad():
        expected = reference(pixels).last_hidden_state
        assert largest(model.tokens(pixels), expected) < 1e-5
        assert largest(model(pixels), expected[:, 0]) < 1e-5


@pytest.mark.parametrize("name", SIZES)
def test_transformers_with_our_weights(name, tmp_path):
    """Our file, loaded by from_pretrained, which would name what is missing or too much."""
    config = ViTConfig(**SIZES[name])
    model = VisionTransformer(config).eval()
    theirs(config, add_pooling_layer=False).config.save_pretrained(tmp_path)
    state = {key: value.contiguous() for key, value in model.published().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    reference, report = ViTModel.from_pretrained(
        tmp_path, add_pooling_layer=False, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pixels = pixels_for(config)
    with torch.no_grad():
        expected = reference.eval()(pixels).last_hidden_state
        assert largest(model.tokens(pixels), expected) < 1e-5


def test_a_classifier_equals_transformers_classifier(tmp_path):
    config = ViTConfig(**SMALL, classes=7)
    reference = theirs(config, ViTForImageClassification)
    model = VisionTransformer(config).load_published(saved(reference, tmp_path))
    pixels = pixels_for(config)
    with torch.no_grad():
        assert largest(model(pixels), reference(pixels).logits) < 1e-5


@pytest.mark.parametrize("size", [(24, 24), (8, 28), (20, 12)], ids=str)
def test_other_sizes_equal_transformers_interpolation(size, tmp_path):
    """Positions learned on 4 x 4 patches, asked for grids that are larger and not square."""
    config = ViTConfig(**SMALL)
    reference = theirs(config, add_pooling_layer=False)
    model = VisionTransformer(config).load_published(saved(reference, tmp_path))
    pixels = pixels_for(config, size=size)
    with torch.no_grad():
        expected = reference(pixels, interpolate_pos_encoding=True).last_hidden_state
        assert largest(model.tokens(pixels), expected) < 1e-5


def test_gradients_reach_every_weight():
    for position in POSITIONS:
        for pooling in ("class", "mean"):
            model = ours(position=position, pooling=pooling, registers=2, classes=3)
            model(pixels_for(model.config)).square().sum().backward()
            silent = [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0]
            # A key's bias moves all scores of a query alike, so softmax does not see it.
            turned = position == "rotary"
            silent = [name for name in silent if turned or not name.endswith("attention.key.bias")]
            assert not silent, (position, pooling)


def shuffled(pixels, patch, order):
    """The same patches in another order."""
    rows = pixels.shape[-2] // patch
    return join_patches(split_patches(pixels, patch)[:, order], patch, rows)


@pytest.mark.parametrize("position", POSITIONS)
def test_only_without_positions_order_means_nothing(position):
    """In float64: features of shuffled patches are the same to rounding, or far from it."""
    model = ours(position=position).double()
    if model.positions is not None:
        torch.nn.init.normal_(model.positions)
    pixels = pixels_for(model.config).double()
    order = torch.randperm(16)
    apart = largest(model(shuffled(pixels, 4, order)), model(pixels))
    assert apart < 1e-12 if position == "none" else apart > 1e-4


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("pooling", ["class", "mean"])
def test_a_picture_is_read_alone_as_in_a_batch(position, pooling):
    """In float64, to rounding: a batch's products may be summed in another order."""
    model = ours(position=position, pooling=pooling, registers=1).double()
    pixels = pixels_for(model.config, batch=3).double()
    alone = torch.cat([model(picture[None]) for picture in pixels])
    torch.testing.assert_close(model(pixels), alone, rtol=1e-10, atol=1e-12)


def test_tokens_stand_in_the_documented_order():
    """Class token, registers, patches; with no blocks and no norm they can be read off."""
    model = ours(layers=0, registers=2).double()
    pixels = pixels_for(model.config).double()
    entered = model.embed(pixels)
    assert entered.shape == (2, 1 + 2 + 16, 32)
    wanted = model.class_token[0] + model.positions[0, :1]
    torch.testing.assert_close(entered[:, :1], wanted.expand(2, 1, -1))
    torch.testing.assert_close(entered[:, 1:3], model.registers.expand(2, -1, -1))
    wanted = model.patches(pixels) + model.positions[:, 1:]
    torch.testing.assert_close(entered[:, 3:], wanted)
    torch.testing.assert_close(model.features(pixels), model.norm(entered)[:, 0])


def test_the_mean_is_of_the_patches_alone():
    model = ours(pooling="mean", registers=3)
    pixels = pixels_for(model.config)
    tokens = model.tokens(pixels)
    assert tokens.shape[1] == 3 + 16
    torch.testing.assert_close(model.features(pixels), tokens[:, 3:].mean(1))


def test_computed_positions_follow_the_picture_to_another_size():
    """Cut three times as finely, the middle one of nine patches stands where the one stood."""
    model = ours(position="sinusoidal")
    coarse, fine = (model.positions_for(grid, model.norm.weight)[0] for grid in ((4, 4), (12, 12)))
    assert torch.count_nonzero(coarse[0]) == 0  # the class token stands nowhere
    middle = fine[1:].view(12, 12, -1)[1::3, 1::3].flatten(0, 1)
    torch.testing.assert_close(middle, coarse[1:])
    model = ours(position="rotary")
    coarse, fine = (model.coordinates(torch.empty(1, 3, size, size)) for size in (16, 48))
    middle = fine.view(12, 12, 2)[1::3, 1::3].flatten(0, 1)
    torch.testing.assert_close(middle, coarse, rtol=0, atol=1e-12)


def test_attention_maps_are_distributions_of_every_head():
    for position in POSITIONS:
        model = ours(position=position)
        maps = model.attention_maps(pixels_for(model.config))
        assert maps.shape == (2, 2, 4, 17, 17)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 4, 17))


def test_attention_maps_equal_transformers(tmp_path):
    """Weights up to 1 in float32, the same sums in another order: 1e-6 is ten roundings."""
    config = ViTConfig(**SMALL)
    reference = theirs(config, add_pooling_layer=False)
    model = VisionTransformer(config).load_published(saved(reference, tmp_path))
    pixels = pixels_for(config)
    with torch.no_grad():
        expected = reference(pixels, output_attentions=True).attentions
    torch.testing.assert_close(
        model.attention_maps(pixels), torch.stack(expected), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("position", POSITIONS)
def test_any_attention_of_that_signature_fits(position):
    """torch's kernel in place of the equation, the same weights, in float64."""
    model = ours(position=position).double()
    fast = VisionTransformer(model.config, attention_sdpa).double()
    fast.load_state_dict(model.state_dict())
    pixels = pixels_for(model.config).double()
    torch.testing.assert_close(fast(pixels), model(pixels), rtol=1e-10, atol=1e-12)


def test_the_published_size():
    """ViT-B/16 has 86,389,248 with its pooler of 590,592, which our features do not use.

    By hand: patches 590,592; class token 768; 197 positions 151,296; each block 7,087,872; the last
    norm 1,536.
    """
    with torch.device("meta"):
        sizes = {"image": 224, "patch": 16, "width": 768, "layers": 12, "heads": 12, "hidden": 3072}
        model = VisionTransformer(ViTConfig(**sizes))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 590_592 + 768 + 151_296 + 12 * 7_087_872 + 1_536 == 86_389_248 - 590_592


@pytest.mark.usefixtures("unchecked")
def test_wrong_pictures_are_refused_in_words():
    model = ours()
    with pytest.raises(ValueError, match="4 do not tile a picture of 16 x 18"):
        model(torch.rand(1, 3, 16, 18))
    with pytest.raises(ValueError, match="for 3 channels, got 1"):
        model(torch.rand(1, 1, 16, 16))
    with pytest.raises(ValueError, match="5 do not tile a picture of 16 x 16"):
        ours(patch=5)
    with pytest.raises(ValueError, match="5 heads cannot share a width of 32"):
        ours(heads=5)


@pytest.mark.parametrize("changes", [{"position": "rotary"}, {"pooling": "mean"}, {"registers": 1}])
def test_only_published_styles_have_published_names(changes):
    with pytest.raises(ValueError, match="published models have learned positions"):
        ours(**changes).published()


def test_a_file_of_another_size_is_refused():
    weights = ours(layers=3).published()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*encoder\.layer\.2"):
        ours().load_published(weights)


def test_transformers_has_no_such_vit():
    for other in ({"position": "rotary"}, {"pooling": "mean"}, {"registers": 4}):
        with pytest.raises(ValueError, match="ViT is learned, class, 0 registers"):
            vit_config(ViTConfig(**SMALL, **other))
