"""Two eyes for copies: a small network that knows drawn photographs only, and the pattern of the vessels.

They have nothing in common but the photographs: the first compares what a network learned to find alike, the second
lays one eye's vessels over another's. Whether an eye sees enough at a given resolution is for planted copies to show
(`gretfound.gate.controls`), never assumed. Photographs are squares of the field of view, as generators draw them;
generators learn mirrored photographs too, so each eye also compares with the mirror image.

Legend of array suffixes: N queries, M references, S side in pixels, D features, T turned and shifted versions, V views.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from scipy import ndimage
from torch import Tensor, nn

from gretfound import fundus, lineage, phantom
from gretfound.evaluation import vessels
from gretfound.fundus import Photograph

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float32]
NETWORK_PX = 32
_DRAWN_PX = 64
_WIDTHS = (32, 64, 128)
_DIMENSION = 64
_PAIRS = 64
_TEMPERATURE = 0.1
_EYE_VERSION = 1
VESSEL_PX = 256
MIN_VESSEL_PX = 288  # of a square: its circle is found a little smaller
_MAP_PX = 40
_TURNS_DEG = (-8.0, -4.0, 0.0, 4.0, 8.0)
_SCALES = (0.94, 1.0, 1.06)
_SHIFTS_PX = (-4, -2, 0, 2, 4)


class Eye(Protocol):
    """Something that tells how alike two photographs are."""

    name: str

    def why_blind(self, size_px: int) -> str:
        """Returns why it cannot see at this resolution; empty where it can."""
        ...

    def look(self, squares: Iterable[Photograph]) -> Floats:
        """Returns what it keeps of photographs, a row each."""
        ...

    def similarity(self, seen_N: Floats, known_M: Floats) -> Floats:
        """Returns how alike queries and references are, (N, M), 1 at most; mirrored ones count as well."""
        ...


class EmbeddingEye:
    """The cosine between what a network makes of two photographs.

    Args:
        network: Maps (B, 4, 32, 32) of `prepare` to (B, D).
    """

    name = "embedding"

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval()

    def why_blind(self, size_px: int) -> str:  # noqa: ARG002 - another eye asks
        """Always empty: planted copies tell."""
        return ""

    @torch.inference_mode()
    def look(self, squares: Iterable[Photograph]) -> Floats:
        """Returns unit vectors of each photograph and of its mirror image, (N, 2, D)."""
        rows = [np.zeros((0, 2, _DIMENSION), np.float32)]
        for block in _blocks(squares, 128):
            x_BCSS = _resized(_as_tensor(block), NETWORK_PX)
            both = [nn.functional.normalize(self._network(prepare(view)), dim=1) for view in (x_BCSS, x_BCSS.flip(-1))]
            rows.append(torch.stack(both, dim=1).numpy())
        return np.concatenate(rows)

    def similarity(self, seen_N: Floats, known_M: Floats) -> Floats:
        """Returns the larger cosine of the two orientations, (N, M)."""
        plain, mirrored = (seen_N[:, view] @ known_M[:, 0].T for view in (0, 1))
        larger: Floats = np.maximum(plain, mirrored)
        return larger


class VesselEye:
    """The correlation of two vessel patterns, the better of small turns, shifts, scales and of the mirror image."""

    name = "vessels"

    def why_blind(self, size_px: int) -> str:
        """Too few pixels leave no vessel to follow."""
        return "" if size_px >= MIN_VESSEL_PX else f"found {size_px} px; vessels need {MIN_VESSEL_PX}"

    def look(self, squares: Iterable[Photograph]) -> Floats:
        """Returns the density of vessels in a grid of 40 x 40 cells, (N, 40, 40)."""
        maps = [np.zeros((0, _MAP_PX, _MAP_PX), np.float32)]
        maps += [_vessel_map(square)[None] for square in squares]
        return np.concatenate(maps)

    def similarity(self, seen_N: Floats, known_M: Floats) -> Floats:
        """Returns the best correlation over all versions of the query, (N, M)."""
        known_MD = torch.from_numpy(_standardised(known_M.reshape(len(known_M), -1)))
        best = np.empty((len(seen_N), len(known_M)), np.float32)
        for row, map_SS in enumerate(seen_N):
            versions_TD = torch.from_numpy(_standardised(_versions(map_SS)))
            best[row] = (versions_TD @ known_MD.T).amax(dim=0).numpy() if len(known_M) else 0.0
        return best


def _blocks(squares: Iterable[Photograph], size: int) -> Iterable[list[Photograph]]:
    remaining = iter(squares)
    while block := list(itertools.islice(remaining, size)):
        yield block


def _as_tensor(squares: Sequence[Photograph]) -> Tensor:
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255.0


def _resized(x_BCSS: Tensor, size_px: int) -> Tensor:
    if x_BCSS.shape[-1] == size_px:
        return x_BCSS
    return nn.functional.interpolate(x_BCSS, size=(size_px, size_px), mode="bilinear", antialias=True)


def prepare(x_BCSS: Tensor) -> Tensor:
    """Returns photographs less their light: standardised colours and the local detail of green, 4 channels."""
    centred = x_BCSS - x_BCSS.mean(dim=(2, 3), keepdim=True)
    colours = centred / (centred.std(dim=(2, 3), keepdim=True) + 1e-3)
    green = x_BCSS[:, 1:2]
    detail = green - nn.functional.avg_pool2d(green, 7, stride=1, padding=3, count_include_pad=False)
    inside = (x_BCSS.amax(dim=1, keepdim=True) > 0.05).float()
    detail = detail * -nn.functional.max_pool2d(-inside, 5, stride=1, padding=2)  # the rim is no detail
    return torch.cat([colours, detail / (detail.std(dim=(2, 3), keepdim=True) + 1e-3)], dim=1)


def build_network() -> nn.Module:
    """Returns the untrained network of the learned eye."""
    layers: list[nn.Module] = []
    width = 4
    for wider in _WIDTHS:
        layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider), nn.SiLU()]
        width = wider
    side = NETWORK_PX >> len(_WIDTHS)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, _DIMENSION))


def trained_eye(
    *, num_drawings: int, num_steps: int, cache_path: Path, on_progress: Callable[[int], None] | None = None
) -> EmbeddingEye:
    """Trains the learned eye on drawn photographs, or finds it trained; it never sees a site's.

    Source: the loss is NT-Xent (Chen et al. 2020, SimCLR, eq. 1).

    Args:
        num_drawings: Drawn eyes to learn from, of all drawn sites alike.
        num_steps: Steps of 64 pairs.
        cache_path: A folder; the file in it is named by what decides the result.
        on_progress: Told how many steps are done.
    """
    recipe = lineage.digest_of(["gate eye", _EYE_VERSION, num_drawings, num_steps])[:16]
    path = cache_path / f"gate-eye-{recipe}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network()
        if path.exists():
            network.load_state_dict(safetensors.torch.load_file(path))
            return EmbeddingEye(network)
        _train(network, _drawings(num_drawings), num_steps, on_progress)
    cache_path.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    safetensors.torch.save_file(network.state_dict(), partial)
    partial.replace(path)
    return EmbeddingEye(network)


def _drawings(num: int) -> Tensor:
    """Draws eyes whose seeds no drawn site of the demo or of a test uses."""
    sites = sorted(phantom.SITES.values(), key=lambda site: site.name)
    squares = []
    for place in range(num):
        image = phantom.draw_eye(sites[place % len(sites)], seed=2**40 + place, size_px=_DRAWN_PX).image
        squares.append(fundus.to_square(image, fundus.find_field_of_view(image), _DRAWN_PX))
    return _as_tensor(squares)


def _train(network: nn.Module, drawn: Tensor, num_steps: int, on_progress: Callable[[int], None] | None) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps)
    generator = torch.Generator().manual_seed(1)
    num_pairs = min(_PAIRS, len(drawn))
    labels = torch.arange(2 * num_pairs).roll(num_pairs)
    network.train()
    for step in range(num_steps):
        chosen = torch.randperm(len(drawn), generator=generator)[:_PAIRS]
        views = torch.cat([_another_visit(drawn[chosen], generator) for _ in range(2)])
        z = nn.functional.normalize(network(prepare(views)), dim=1)
        logits = (z @ z.T / _TEMPERATURE).fill_diagonal_(-torch.inf)
        loss: Tensor = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if on_progress is not None:
            on_progress(step + 1)
    network.eval()


def _another_visit(x_BCSS: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the same eyes turned, shifted, nearer or farther, in other light, sharper or less so."""
    num = len(x_BCSS)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((num, *shape), generator=generator)

    angle, scale = between(-0.21, 0.21), between(0.88, 1.12)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    shift = between(-0.16, 0.16, 2)
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = nn.functional.affine_grid(theta, [num, 3, NETWORK_PX, NETWORK_PX], align_corners=False)
    moved = nn.functional.grid_sample(x_BCSS, grid, align_corners=False)
    line = torch.linspace(-1, 1, NETWORK_PX)
    tilt = between(-0.2, 0.2, 2)
    light = 1 + tilt[:, 0, None, None] * line[:, None] + tilt[:, 1, None, None] * line
    moved = (moved * between(0.75, 1.3, 3, 1, 1) * light[:, None]).clamp(1e-4, 1) ** between(0.8, 1.25, 1, 1, 1)
    blurred = nn.functional.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
    moved = torch.lerp(moved, blurred, between(0.0, 1.0, 1, 1, 1))
    return (moved + 0.02 * torch.randn(moved.shape, generator=generator)).clamp(0, 1)


def _vessel_map(square: Photograph) -> Floats:
    try:
        is_vessel, _ = vessels.segment(square, size_px=VESSEL_PX)
    except ValueError:  # no field of that size in it: nothing to compare
        return np.zeros((_MAP_PX, _MAP_PX), np.float32)
    smooth = ndimage.gaussian_filter(is_vessel.astype(np.float32), VESSEL_PX / _MAP_PX / 2)
    reduced: Floats = ndimage.zoom(smooth, _MAP_PX / VESSEL_PX, order=1)
    return reduced


def _standardised(rows_ND: Floats) -> Floats:
    centred = rows_ND - rows_ND.mean(axis=1, keepdims=True)
    standardised: Floats = (centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)).astype(
        np.float32
    )
    return standardised


def _versions(map_SS: Floats) -> Floats:
    """Returns a map turned, scaled, shifted and mirrored in all ways, (T, D)."""
    plain = torch.from_numpy(np.stack([map_SS, map_SS[:, ::-1]]))
    turned = nn.functional.grid_sample(
        plain.reshape(1, 2, _MAP_PX, _MAP_PX).expand(len(_grid()), -1, -1, -1), _grid(), align_corners=False
    )
    return turned.reshape(-1, _MAP_PX * _MAP_PX).numpy()


@functools.cache
def _grid() -> Tensor:
    thetas = []
    for turn, scale, x, y in itertools.product(np.radians(_TURNS_DEG), _SCALES, _SHIFTS_PX, _SHIFTS_PX):
        cos, sin = scale * np.cos(turn), scale * np.sin(turn)
        thetas.append([[cos, -sin, 2 * x / _MAP_PX], [sin, cos, 2 * y / _MAP_PX]])
    theta = torch.tensor(np.array(thetas), dtype=torch.float32)
    return nn.functional.affine_grid(theta, [len(theta), 1, _MAP_PX, _MAP_PX], align_corners=False)
