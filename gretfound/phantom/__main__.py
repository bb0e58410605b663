"""`python -m gretfound.phantom`: a drawn site's folder from the command line."""

import argparse
from pathlib import Path

from gretfound.phantom import SITES, write_site


def main() -> None:
    """Writes one site's folder from the command line."""
    parser = argparse.ArgumentParser(prog="python -m gretfound.phantom", description="Draws a site's CFPs.")
    parser.add_argument("site", choices=sorted(SITES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-images", type=int, default=200)
    parser.add_argument("--size-px", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-format", choices=("jpg", "png"), default="jpg")
    chosen = parser.parse_args()
    write_site(
        SITES[chosen.site],
        chosen.folder,
        num_images=chosen.num_images,
        seed=chosen.seed,
        size_px=chosen.size_px,
        image_format=chosen.image_format,
    )


if __name__ == "__main__":
    main()
