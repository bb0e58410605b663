"""The masked autoencoder against an independent reference written from the paper's equations."""

import numpy as np
import pytest
import torch
from torch import nn

from gretfound.encoder.architecture import build_encoder, sine_cosine_positions
from gretfound.encoder.mae import DETAIL_UNIT, MaskedAutoencoder, details_of, reconstruct
from gretfound.encoder.transform import IMAGENET_MEAN, IMAGENET_STD


def small_autoencoder(**changes: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny_patch16_224", image_size_px=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    settings = {"decoder_width": 32, "decoder_depth": 2, "decoder_num_heads": 4, "mask_seed": 3} | changes
    return MaskedAutoencoder(encoder, **settings)  # type: ignore[arg-type]


def reference_loss(autoencoder: MaskedAutoencoder, image: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The paper's way: embed every patch, drop the hidden ones, predict every patch, score the hidden ones.

    Source: He et al., CVPR 2022, sections 3 and 4.1. Attention is written out; nothing of the class is called but its
    weights and its drawn mask.
    """
    encoder, weights = autoencoder.encoder, dict(autoencoder.named_parameters())
    size = autoencoder.patch_size

    def linear(value: torch.Tensor, name: str) -> torch.Tensor:
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(value: torch.Tensor, name: str, epsilon: float) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def block(value: torch.Tensor, name: str, num_heads: int, epsilon: float) -> torch.Tensor:
        batch, length, width = value.shape
        query, key, content = (
            linear(norm(value, f"{name}.norm1", epsilon), f"{name}.attn.qkv")
            .reshape(batch, length, 3, num_heads, width // num_heads)
            .permute(2, 0, 3, 1, 4)
        )
        attention = (query @ key.transpose(-2, -1) / (width // num_heads) ** 0.5).softmax(-1) @ content
        value = value + linear(attention.transpose(1, 2).reshape(batch, length, width), f"{name}.attn.proj")
        hidden = nn.functional.gelu(linear(norm(value, f"{name}.norm2", epsilon), f"{name}.mlp.fc1"))
        return value + linear(hidden, f"{name}.mlp.fc2")

    normalised = (image.float() / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(
        3, 1, 1
    )
    embedded = nn.functional.conv2d(
        normalised, weights["encoder.patch_embed.proj.weight"], weights["encoder.patch_embed.proj.bias"], stride=size
    )
    tokens = embedded.flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]
    kept, masked = autoencoder.split(position)
    rows = torch.arange(len(image))[:, None]
    value = torch.cat(
        [(encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(image), -1, -1), tokens[rows, kept]], 1
    )
    for index in range(len(encoder.blocks)):
        value = block(value, f"encoder.blocks.{index}", 3, 1e-6)
    value = linear(norm(value, "encoder.norm", 1e-6), "decoder_embed")

    full = autoencoder.mask_token.repeat(len(image), autoencoder.num_patches, 1)
    full[rows, kept] = value[:, 1:]
    full = torch.cat([value[:, :1], full + sine_cosine_positions(32, 4)], dim=1)
    for index in range(len(autoencoder.decoder_blocks)):
        full = block(full, f"decoder_blocks.{index}", 4, 1e-5)
    predicted = linear(norm(full, "decoder_norm", 1e-5), "decoder_predict")[:, 1:]

    target = torch.stack(
        [
            normalised[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size].flatten(1)
            for row in range(4)
            for column in range(4)
        ],
        dim=1,
    )
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    per_patch = (predicted - target).pow(2).mean(-1)
    is_masked = torch.zeros(len(image), autoencoder.num_patches)
    is_masked[rows, masked] = 1.0
    return (per_patch * is_masked).sum() / is_masked.sum()


def some_images(num: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_forward__same_loss_and_gradients_as_the_paper() -> None:
    autoencoder, image, position = small_autoencoder(), some_images(), torch.tensor([0, 7, 8, 123_456, 2])
    loss = autoencoder(image=image, position=position)
    loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in autoencoder.named_parameters() if parameter.grad is not None
    }
    autoencoder.zero_grad()
    expected = reference_loss(autoencoder, image, position)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert set(gradients) == {name for name, parameter in autoencoder.named_parameters() if parameter.requires_grad}
    for name, parameter in autoencoder.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_forward__an_image_counts_the_same_in_any_batch() -> None:
    autoencoder, image, position = small_autoencoder(), some_images(4), torch.arange(4)
    together = autoencoder(image=image, position=position)
    apart = [autoencoder(image=image[i : i + 1], position=position[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.stack(apart).mean())


def test_split__a_quarter_is_kept_and_the_mask_follows_the_position() -> None:
    autoencoder = small_autoencoder()
    kept, masked = autoencoder.split(torch.tensor([5, 9]))
    assert kept.shape == (2, 4) and masked.shape == (2, 12)
    assert sorted(torch.cat([kept[0], masked[0]]).tolist()) == list(range(16))
    assert not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(autoencoder.split(torch.tensor([9]))[0], kept[1:])


def test_encode__hidden_patches_cannot_be_seen() -> None:
    autoencoder, image = small_autoencoder(), some_images(1)
    patches = autoencoder.patches(autoencoder.normalised(image))
    kept, masked = autoencoder.split(torch.tensor([0]))
    changed = patches.clone()
    changed[:, masked[0]] += 1.0
    torch.testing.assert_close(autoencoder.encode(patches, kept), autoencoder.encode(changed, kept))


def test_encode__all_patches_kept_gives_timms_own_features() -> None:
    autoencoder = small_autoencoder(mask_ratio=0.0)
    image = autoencoder.normalised(some_images(2))
    order = torch.arange(16).expand(2, -1)
    ours = autoencoder.encode(autoencoder.patches(image), order)
    torch.testing.assert_close(ours, autoencoder.encoder.forward_features(image), rtol=1e-4, atol=1e-5)


def test_sine_cosine_positions__distinct_and_bounded() -> None:
    positions = sine_cosine_positions(48, 14)
    assert positions.shape == (196, 48)
    assert positions.abs().max() <= 1
    assert len(np.unique(positions.numpy().round(5), axis=0)) == 196


@pytest.mark.parametrize("normalise_patches", [True, False])
def test_reconstruct__visible_patches_are_the_photographs_own(normalise_patches: bool) -> None:
    autoencoder = small_autoencoder(normalise_patches=normalise_patches)
    image = some_images(2)
    masked_picture, reconstruction = reconstruct(autoencoder, image)
    kept, _ = autoencoder.split(torch.arange(2))
    for index in range(2):
        for patch in kept[index].tolist():
            row, column = patch // 4 * 8, patch % 4 * 8
            original = image[index, :, row : row + 8, column : column + 8].permute(1, 2, 0).numpy()
            for picture in (masked_picture, reconstruction):
                np.testing.assert_array_equal(picture[index, row : row + 8, column : column + 8], original)


def test_reconstruct__hides_what_the_loss_leaves_out_too() -> None:
    image = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    whole, subset = (reconstruct(small_autoencoder(predicted_share=share), image)[0] for share in (1.0, 0.25))
    np.testing.assert_array_equal(whole, subset)
    assert (subset == 255).mean() < 0.3


def eye_with_a_spot() -> torch.Tensor:
    """A bright round field of view whose light falls to one side, with a dark spot of radius 2 px: (1, 3, 64, 64)."""
    y, x = np.mgrid[:64, :64].astype(np.float32)
    light = 0.4 + 0.004 * x + 0.002 * y
    light[np.hypot(x - 40, y - 24) < 2] -= 0.2
    light[np.hypot(x - 31.5, y - 31.5) > 30] = 0
    return torch.from_numpy(light).expand(1, 3, 64, 64)


def test_details_of__a_spot_stays_and_slow_light_goes() -> None:
    detail = details_of(eye_with_a_spot(), cell_px=8)[0, 0].numpy()
    assert detail[24, 40] < -0.15
    y, x = np.mgrid[:64, :64]
    from_middle, is_apart = np.hypot(x - 31.5, y - 31.5), np.hypot(x - 40, y - 24) > 16
    assert np.abs(detail[(from_middle < 16) & is_apart]).max() < 0.02, "the light differs by 0.3 across the field"
    assert np.abs(detail[is_apart]).max() < 0.06, "at the edge the average is that of one side"
    assert not detail[from_middle > 30].any()


def test_forward__details_are_scored_by_their_huber_loss() -> None:
    autoencoder = small_autoencoder(target="details", normalise_patches=False)
    image = torch.from_numpy(np.random.default_rng(0).integers(60, 200, (2, 3, 32, 32), dtype=np.uint8))
    position = torch.tensor([4, 9])
    kept, masked = autoencoder.split(position)
    predicted = autoencoder.predict(autoencoder.patches(autoencoder.normalised(image)), kept, masked)
    detail = details_of(image.float() / 255, cell_px=8) / DETAIL_UNIT
    cut = detail.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)
    error = (predicted - cut[torch.arange(2)[:, None], masked]).abs()
    expected = torch.where(error < 1, error**2 / 2, error - 0.5).mean()
    torch.testing.assert_close(autoencoder(image, position), expected)


def test_reconstruct__true_details_give_the_photograph_back(monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = small_autoencoder(target="details", normalise_patches=False)
    image = torch.from_numpy(np.random.default_rng(0).integers(60, 200, (1, 3, 32, 32), dtype=np.uint8))
    truth = autoencoder.patches(details_of(image.float() / 255, cell_px=8) / DETAIL_UNIT)
    monkeypatch.setattr(autoencoder, "predict", lambda patch, kept, masked: truth[torch.arange(1)[:, None], masked])
    _, reconstructed = reconstruct(autoencoder, image)
    assert np.array_equal(reconstructed[0], image[0].permute(1, 2, 0).numpy())


def test_init__normalised_details_are_refused() -> None:
    with pytest.raises(ValueError, match="normalise_patches=True"):
        small_autoencoder(target="details")
