"""Three eyes for copies: a small network that knows drawn photographs only, local details, and the vessels' pattern.

The first compares what a network learned to find alike; the other two lay one photograph over the other, as its green
channel less the light around it, or as the dark lines in it. Whether an eye sees enough at a given
resolution is for planted copies to show (`gretfound.gate.controls`), never assumed; how far each one sees real
photographs is in docs/log.md. Photographs are squares of the field of view, as generators draw them; generators learn
mirrored photographs too, so each eye also compares with the mirror image.

Legend of array suffixes: N queries, M references, S side in pixels, D features, T turned and shifted versions, R turned
and scaled ones, W side of a map with what is shifted in.
"""

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
_DARK = 0.08  # of full light; below it is no field of view
_LIGHT_PX, _CONTRAST_PX, _RIM_PX = 5, 9, 5  # of a map of 40 px: what counts as around a pixel
_MAX_DETAIL = 1.5  # standard deviations
_BLUR_PX = 0.5
_TOP_QUANTILE = 0.95  # of the strength of lines within the field: there is vessel above it
_AROUND_PX = 3.0  # what all eyes have in common: more vessels in one half than in the other


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


class _LaidOver:
    """The correlation of two maps of 40 x 40 cells, the best over turns, scales, shifts and the mirror image.

    Args:
        scales: Of the query.
        reach: How far the query is shifted along each axis, in cells.
        step: Between two shifts, in cells.
    """

    def __init__(self, scales: Sequence[float], *, reach: int, step: int) -> None:
        self._step, wide_px = step, _MAP_PX + 2 * reach
        thetas = []
        for turn, scale in itertools.product(np.radians(_TURNS_DEG), scales):
            cos, sin = scale * np.cos(turn), scale * np.sin(turn)
            thetas.append([[cos, -sin, 0.0], [sin, cos, 0.0]])
        theta = torch.tensor(np.array(thetas), dtype=torch.float32)
        grid = nn.functional.affine_grid(theta, [len(theta), 1, wide_px, wide_px], align_corners=False)
        self._grid_RWW2 = grid * (wide_px / _MAP_PX)

    @torch.inference_mode()
    def similarity(self, seen_N: Floats, known_M: Floats) -> Floats:
        """Returns the best correlation over all versions of the query, (N, M)."""
        known_MD = torch.from_numpy(known_M.reshape(len(known_M), _MAP_PX * _MAP_PX))
        known_MD = known_MD - known_MD.mean(dim=1, keepdim=True)
        known_MD = known_MD / known_MD.norm(dim=1, keepdim=True).clamp(min=1e-6)
        best = np.zeros((len(seen_N), len(known_M)), np.float32)
        if len(known_M):
            for row, map_SS in enumerate(seen_N):
                versions_TD = self._versions(map_SS)
                mean_T, square_T = versions_TD.mean(dim=1), versions_TD.square().mean(dim=1)
                length_T = ((square_T - mean_T.square()) * versions_TD.shape[1]).clamp(min=1e-12).sqrt()
                best[row] = ((versions_TD @ known_MD.T) / length_T[:, None]).amax(dim=0).numpy()
        return best

    def _versions(self, map_SS: Floats) -> Tensor:
        """Returns a map turned, scaled, shifted and mirrored in all ways, (T, D)."""
        plain = torch.from_numpy(np.stack([map_SS, map_SS[:, ::-1]]))
        wide = plain[None].expand(len(self._grid_RWW2), -1, -1, -1)
        turned = nn.functional.grid_sample(wide, self._grid_RWW2, align_corners=False)
        shifted = turned.unfold(2, _MAP_PX, self._step).unfold(3, _MAP_PX, self._step)
        return shifted.reshape(-1, _MAP_PX * _MAP_PX)


class DetailEye(_LaidOver):
    """The correlation of two photographs' local details, laid over each other in steps of one cell.

    Details are fine: in steps of two cells, as the vessels are laid over each other, a copy shifted by one is missed.
    """

    name = "details"

    def __init__(self) -> None:
        super().__init__((0.94, 0.98, 1.02, 1.06, 1.1), reach=3, step=1)

    def why_blind(self, size_px: int) -> str:  # noqa: ARG002 - another eye asks
        """Always empty: planted copies tell."""
        return ""

    @torch.inference_mode()
    def look(self, squares: Iterable[Photograph]) -> Floats:
        """Returns the details of green, of equal contrast everywhere, (N, 40, 40)."""
        maps = [np.zeros((0, _MAP_PX, _MAP_PX), np.float32)]
        for block in _blocks(squares, 128):
            details_BSS = _details(_resized(_as_tensor(block), _MAP_PX))[:, 0].numpy()
            maps.append(ndimage.gaussian_filter(details_BSS, (0, _BLUR_PX, _BLUR_PX)))
        return np.concatenate(maps)


class VesselEye(_LaidOver):
    """The correlation of two vessel patterns, the better of small turns, shifts, scales and of the mirror image."""

    name = "vessels"

    def __init__(self) -> None:
        super().__init__((0.94, 1.0, 1.06), reach=4, step=2)

    def why_blind(self, size_px: int) -> str:
        """Too few pixels leave no vessel to follow."""
        return "" if size_px >= MIN_VESSEL_PX else f"found {size_px} px; vessels need {MIN_VESSEL_PX}"

    def look(self, squares: Iterable[Photograph]) -> Floats:
        """Returns the vessels in a grid of 40 x 40 cells, less how many there are around, (N, 40, 40).

        They are as strong as the lines that are found, not segmented: with blur, thin vessels fall below any threshold.
        """
        maps = [np.zeros((0, _MAP_PX, _MAP_PX), np.float32)]
        maps += [_vessel_map(square)[None] for square in squares]
        return np.concatenate(maps)


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
        strength_HW, is_seen_HW = vessels.line_strength(square, size_px=VESSEL_PX)
    except ValueError:  # no field of that size in it: nothing to compare
        return np.zeros((_MAP_PX, _MAP_PX), np.float32)
    lines_HW = np.where(is_seen_HW, strength_HW.clip(min=0.0), 0.0)
    top = float(np.quantile(lines_HW[is_seen_HW], _TOP_QUANTILE)) if is_seen_HW.any() else 0.0
    smooth = ndimage.gaussian_filter(np.minimum(lines_HW / max(top, 1e-6), 1.0), VESSEL_PX / _MAP_PX / 2)
    reduced: Floats = ndimage.zoom(smooth.astype(np.float32), _MAP_PX / VESSEL_PX, order=1)
    reduced -= ndimage.gaussian_filter(reduced, _AROUND_PX)
    return reduced


def _details(x_BCSS: Tensor) -> Tensor:
    """Returns green less the light around it over the contrast around it, within the rim, (B, 1, S, S)."""
    inside = (x_BCSS.amax(dim=1, keepdim=True) > _DARK).float()
    inside = -nn.functional.max_pool2d(-inside, _RIM_PX, stride=1, padding=_RIM_PX // 2)
    green = x_BCSS[:, 1:2]

    def around(values: Tensor, side_px: int) -> Tensor:
        total, weight = (nn.functional.avg_pool2d(each, side_px, 1, side_px // 2) for each in (values * inside, inside))
        return total / weight.clamp(min=1e-3)

    light = around(green, _LIGHT_PX)
    detail = (green - light) / (light + 0.05) * inside
    contrast = around(detail.square(), _CONTRAST_PX).sqrt()
    usual = contrast.mean(dim=(2, 3), keepdim=True)
    return (detail / (contrast + 0.3 * usual + 1e-6)).clamp(-_MAX_DETAIL, _MAX_DETAIL) * inside
