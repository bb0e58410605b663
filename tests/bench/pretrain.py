"""One pretraining step on CPU: ours against a plain PyTorch loop that embeds and predicts every patch.

ViT-B/16, 224 px, mask ratio 0.75, two cores. The peer is written as the first public implementations are: float32,
every patch embedded before three quarters are dropped, every patch predicted before the visible ones' answers are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gretfound import fit
from gretfound.encoder.architecture import build_encoder
from gretfound.encoder.mae import MaskedAutoencoder
from tests.bench.outcome import Ratio, Row, rate, repeated, write

BATCH_SIZE, NUM_STEPS = 16, 3


class PlainAutoencoder(MaskedAutoencoder):
    """The same weights and loss, computed the long way round."""

    def forward(self, image: Tensor, position: Tensor) -> Tensor:
        """Embeds all patches, encodes the kept ones, decodes and predicts all, scores the masked ones."""
        normalised = self.normalised(image)
        kept_BK, masked_BM = self.split(position)
        rows = torch.arange(len(image))[:, None]
        token = self.encoder.patch_embed(normalised) + self.encoder.pos_embed[:, 1:]
        class_token = (self.encoder.cls_token + self.encoder.pos_embed[:, :1]).expand(len(image), -1, -1)
        token = torch.cat([class_token, token[rows, kept_BK]], dim=1)
        for block in self.encoder.blocks:
            token = block(token)
        token = self.decoder_embed(self.encoder.norm(token))
        full = self.mask_token.repeat(len(image), self.num_patches, 1)
        full[rows, kept_BK] = token[:, 1:]
        full = torch.cat([token[:, :1], full + self.decoder_positions], dim=1)
        for block in self.decoder_blocks:
            full = block(full)
        predicted = self.decoder_predict(self.decoder_norm(full))[:, 1:]
        target = self.patches(normalised)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        is_masked = torch.zeros(len(image), self.num_patches).scatter(1, masked_BM, 1.0)
        return ((predicted - target).pow(2).mean(-1) * is_masked).sum() / is_masked.sum()


def main() -> None:
    """Measures and writes runs/bench/pretraining.json."""
    torch.manual_seed(0)
    ours, plain = (
        kind(build_encoder("vit_base_patch16_224", image_size_px=224)) for kind in (MaskedAutoencoder, PlainAutoencoder)
    )
    plain.load_state_dict(ours.state_dict())
    images = torch.randint(0, 256, (BATCH_SIZE, 3, 224, 224), dtype=torch.uint8)
    batch = {"image": images, "position": torch.arange(BATCH_SIZE)}
    with torch.no_grad():
        difference = abs(float(ours(**batch)) - float(plain(**batch)))

    def batches(start: int) -> Iterator[dict[str, Tensor]]:
        while True:
            yield batch

    def train(precision: str) -> None:
        fit.train(
            ours, batches, num_images=BATCH_SIZE * NUM_STEPS, batch_size=BATCH_SIZE, peak_lr=1e-4, precision=precision
        )

    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def train_plainly(objective: nn.Module = plain) -> None:
        for _ in range(NUM_STEPS):
            optimizer.zero_grad()
            objective(**batch).backward()
            optimizer.step()

    num_images = BATCH_SIZE * NUM_STEPS
    rates = {
        precision: repeated(lambda precision=precision: rate(lambda: train(precision), num_images=num_images))  # type: ignore[misc]
        for precision in ("float32", "bfloat16")
    }
    peer = repeated(lambda: rate(train_plainly, num_images=num_images))
    write(
        "pretraining",
        [
            Row("gretfound.fit.train, float32", rates["float32"], "images/s"),
            Row("gretfound.fit.train, bfloat16", rates["bfloat16"], "images/s"),
            Row("plain PyTorch loop, float32", peer, "images/s"),
            Row("difference of the two losses on equal weights, times 1e6", difference * 1e6, "1e-6"),
        ],
        [
            Ratio("float32 step over plain loop", rates["float32"] / peer, ">= 1.0"),
            Ratio("bfloat16 step over plain loop", rates["bfloat16"] / peer, ">= 1.6 (issue 3)"),
        ],
    )
