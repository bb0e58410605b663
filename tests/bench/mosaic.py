"""The ingest benchmark's peer on mosaicml-streaming; runs in the environment of mosaic.sh, not in the project's.

mosaic.py PHOTOGRAPHS FOLDER SIZE_PX BATCH_SIZE SHORT LONG WORKERS; the last word that it prints is images a second:
those of LONG epochs over the time that they take more than SHORT ones.
"""

import sys
import time
from pathlib import Path

from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader
from torchvision import transforms


class Photographs(StreamingDataset):
    """MDS samples as normalised crops."""

    def __init__(self, folder: str, size_px: int, batch_size: int) -> None:
        super().__init__(local=folder, shuffle=True, batch_size=batch_size)
        self.recipe = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size_px, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            ]
        )

    def __getitem__(self, at: int) -> object:
        return self.recipe(super().__getitem__(at)["image"])


def main() -> None:
    """Writes the photographs as MDS, then reads them for some epochs."""
    source, folder = Path(sys.argv[1]), sys.argv[2]
    size_px, batch_size, short, long, workers = map(int, sys.argv[3:8])
    with MDSWriter(out=folder, columns={"image": "jpeg"}) as writer:
        from PIL import Image

        for path in sorted(source.glob("*.jpg")):
            with Image.open(path) as opened:
                opened.load()
                opened.filename = str(path)
                writer.write({"image": opened})
    photographs = Photographs(folder, size_px, batch_size)
    loader = DataLoader(photographs, batch_size=batch_size, num_workers=workers, persistent_workers=True)
    seen, took_s = [], []
    for epochs in (short, long):
        began_s = time.perf_counter()
        seen.append(sum(len(batch) for _ in range(epochs) for batch in loader))
        took_s.append(time.perf_counter() - began_s)
    print((seen[1] - seen[0]) / (took_s[1] - took_s[0]))


if __name__ == "__main__":
    main()
