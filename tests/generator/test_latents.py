"""Latents: encoded once, the same whoever else is there, and read in an order that is a function of the position."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from gretfound import fundus, metadata, shard
from gretfound.errors import ConfigError
from gretfound.generator import autoencoding, latents, pipeline, squares
from tests.tiny_generator import RESOLUTION_PX, rows_of, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return pipeline.load_pipeline(write_base(tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture(scope="module")
def caches(base: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The caches of a shard of four photographs, one of which is unreadable, and of one of eighteen."""
    folder = tmp_path_factory.mktemp("caches")
    rows = rows_of(22)
    rows[1] = {**rows[1], "image": b"no photograph"}
    found = []
    for name, part, num_readable in (("0", rows[:4], 3), ("1", rows[4:], 18)):
        shard.write_shard_file(folder / "shard.parquet", part)
        num = latents.encode_shard(folder / "shard.parquet", folder / name, base=base, resolution_px=RESOLUTION_PX)
        assert num == num_readable
        found.append(folder / name)
    return found


def test_lay_out__holds_what_the_encoders_make_of_each_photograph(
    base: StableDiffusionPipeline, caches: list[Path], tmp_path: Path
) -> None:
    found = latents.lay_out(caches, tmp_path)
    assert (found.num_images, len(found.latents), len(found.text)) == (21, 42, len(found.captions))
    readable = [row for place, row in enumerate(rows_of(22)) if place != 1]
    for place in (0, 2, 3, 20):
        cells = {name: readable[place][name] for name in ("eye", "age", "sex", "dr", "dr_present", "glaucoma")}
        square = squares.square_of(readable[place]["image"], cells, resolution_px=RESOLUTION_PX)
        pixels = squares.as_tensor([square.pixels])
        for view, (each, caption) in enumerate([(pixels, square.caption), (pixels.flip(-1), square.mirrored_caption)]):
            row = torch.tensor([2 * place + view])
            assert found.captions[int(found.caption_numbers[row, 0])] == caption
            torch.testing.assert_close(found.latents[row], autoencoding.encode_photographs(base.vae, each))
            ids = pipeline.caption_ids(base.tokenizer, [caption])
            expected = base.text_encoder(ids).last_hidden_state.detach()
            torch.testing.assert_close(found.text[found.caption_numbers[row, 0]], expected)
    empty = base.text_encoder(pipeline.caption_ids(base.tokenizer, [""])).last_hidden_state[0].detach()
    torch.testing.assert_close(found.empty_text, empty)


def test_lay_out__leaves_out_and_asks_for_one_photograph(caches: list[Path], tmp_path: Path) -> None:
    ids = [row["image_id"] for row in rows_of(22)]
    whole, part = latents.lay_out(caches, tmp_path / "a"), latents.lay_out(caches, tmp_path / "b", left_out=ids[2:5])
    assert part.num_images == 18
    assert torch.equal(part.latents[torch.arange(2, 36)], whole.latents[torch.arange(8, 42)])
    with pytest.raises(ConfigError, match="no readable photograph"):
        latents.lay_out(caches, tmp_path / "c", left_out=ids)


def test_key_of__changes_with_what_a_cache_depends_on_and_with_nothing_else(tmp_path: Path) -> None:
    files = latents.encoding_files(write_base(tmp_path / "base"))
    given = {"shard_sha256": "0", "resolution_px": 32}
    key = latents.key_of(files, **given)
    assert latents.key_of([*reversed(files), ("unet/x", "1")], **given) == key
    others = [
        latents.key_of(files, **given | {name: value}) for name, value in (("shard_sha256", "1"), ("resolution_px", 64))
    ]
    others += [latents.key_of([*files[1:], (files[0][0], "1")], **given)]
    assert len({key, *others}) == 4
    assert {path.split("/")[0] for path, _ in files} == {"text_encoder", "tokenizer", "vae"}


def test_encode_shard__a_size_that_does_not_fit_is_refused(base: StableDiffusionPipeline, tmp_path: Path) -> None:
    shard.write_shard_file(tmp_path / "shard.parquet", rows_of(1))
    with pytest.raises(ConfigError, match="multiple of 4"):
        latents.encode_shard(tmp_path / "shard.parquet", tmp_path / "cache", base=base, resolution_px=30)
    assert not (tmp_path / "cache").exists()


def test_latent_batches__every_epoch_is_a_permutation_and_any_start_agrees(caches: list[Path], tmp_path: Path) -> None:
    photographs = latents.lay_out(caches, tmp_path)
    stream = latents.latent_batches(photographs, batch_size=7, seed=1, has_text=False)
    batches = [batch for batch, _ in zip(stream(0), range(12), strict=False)]
    for epoch in range(4):
        position = torch.arange(21 * epoch, 21 * (epoch + 1))
        photograph, view = latents.order_at(position, num_images=21, seed=1)
        assert sorted(photograph.tolist()) == list(range(21))
        seen = torch.cat([batch["latents_BCHW"] for batch in batches[3 * epoch : 3 * epoch + 3]])
        assert torch.equal(seen, photographs.latents[2 * photograph + view])
        assert 0 < int(view.sum()) < 21
    later = next(stream(14))
    assert all(torch.equal(later[name], batches[2][name]) for name in later)
    text = next(latents.latent_batches(photographs, batch_size=7, seed=1)(14))["caption"]
    assert torch.equal(text, photographs.text[later["caption"]])


def test_latent_batches__shortens_captions_by_another_draw(base: StableDiffusionPipeline, tmp_path: Path) -> None:
    rows = rows_of(3)
    shard.write_shard_file(tmp_path / "shard.parquet", rows)
    settings = {"base": base, "resolution_px": RESOLUTION_PX, "cell_dropout": 0.3}
    latents.encode_shard(tmp_path / "shard.parquet", tmp_path / "cache", **settings)
    photographs = latents.lay_out([tmp_path / "cache"], tmp_path / "rows", cell_dropout=0.3)
    given = {"batch_size": 3, "seed": 1}
    num_said: Counter[str] = Counter()
    stream = latents.latent_batches(photographs, has_text=False, **given)(0)
    texts = latents.latent_batches(photographs, **given)(0)
    for first, batch, embedded in zip(range(0, 600, 3), stream, texts, strict=False):
        photograph, view = latents.order_at(torch.arange(first, first + 3), num_images=3, seed=1)
        for place in range(3):
            said = photographs.captions[int(batch["caption"][place])]
            cells = {name: rows[int(photograph[place])][name] for name in ("eye", "age", "sex", "dr", "glaucoma")}
            cells["eye"] = cells["eye"] if not view[place] else {"left": "right", "right": "left"}[cells["eye"]]
            assert set(said.split(", ")) <= {*metadata.caption(cells).split(", "), "man", "woman"} | {
                f"{int(cells['age'])}-year-old person"
            }
            num_said.update(["eye"] * (" eye" in said) + ["age"] * ("-year-old" in said))
        expected = base.text_encoder(
            pipeline.caption_ids(base.tokenizer, [photographs.captions[int(n)] for n in batch["caption"]])
        ).last_hidden_state.detach()
        torch.testing.assert_close(embedded["caption"], expected)
    assert 0.6 < num_said["eye"] / 600 < 0.8 and 0.6 < num_said["age"] / 600 < 0.8


def test_latent_batches__a_step_in_parts_is_the_same_step(caches: list[Path], tmp_path: Path) -> None:
    photographs = latents.lay_out(caches, tmp_path)
    whole, parts = (latents.latent_batches(photographs, batch_size=6, seed=1, accumulation=n)(12) for n in (1, 3))
    for _ in range(3):
        step, given = next(whole), [next(parts) for _ in range(3)]
        assert all(torch.equal(step[name], torch.cat([part[name] for part in given])) for name in step)


def test_rows__are_read_by_number(tmp_path: Path) -> None:
    numbers = torch.arange(24.0).view(4, 2, 3)
    (tmp_path / "rows").write_bytes(numbers.numpy().astype("<f4").tobytes())
    rows = latents.Rows(tmp_path / "rows", (2, 3))
    assert len(rows) == 4
    assert torch.equal(rows[torch.tensor([3, 0, 3])], numbers[[3, 0, 3]])


def test_square_of__an_unreadable_photograph_is_an_error() -> None:
    with pytest.raises(fundus.UnreadablePhotograph):
        squares.square_of(b"no photograph", {}, resolution_px=16)
