"""De-identification: photographs a second, text found in pictures by size, colour, direction and script, false alarms.

Text is planted on real photographs where ../shared/cfp lies beside the project, on drawn ones elsewhere. Scripts that
the machine has no font for are left out. The photographs that the thresholds of `gretfound.lettering` were chosen on
(every eighth of each folder) are not used.
"""

import io
import os
import random
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gretfound import deidentify, fundus, lettering, phantom
from tests.bench.outcome import Ratio, Row, write

REAL_PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "cfp"
NUM_TEXT, NUM_CLEAN, NUM_TIMED = (int(os.environ.get(f"BENCH_{name}", "0")) or default
                                  for name, default in (("TEXT", 6), ("CLEAN", 60), ("TIMED", 60)))  # fmt: skip
SPOTS = ((-0.55, -0.4), (0.1, -0.35), (-0.5, 0.2), (0.0, 0.4))
UPRIGHT_SPOTS = ((-0.5, -0.3), (-0.1, -0.35), (0.2, -0.3), (0.5, -0.25))
COLOURS = {"light": (255, 255, 255), "dark": (10, 10, 10), "yellow": (250, 240, 60), "green": (60, 220, 60)}
WORDS = {
    "Latin": ("SMITH JOHN", "MRN 483920", "12/04/1958", "Mueller, A.", "ID:77120934", "Doe Jane F", "14:32:07"),
    "Cyrillic": ("\u0418\u0412\u0410\u041d\u041e\u0412 \u041f\u0401\u0422\u0420",
                 "\u0421\u0438\u0434\u043e\u0440\u043e\u0432\u0430"),
    "Greek": ("\u03a0\u0391\u03a0\u0391\u0394\u039f\u03a0\u039f\u03a5",
              "\u039d\u03af\u03ba\u03bf\u03c2 \u0393\u03b5\u03c9"),
    "Arabic": ("\u0645\u062d\u0645\u062f \u0639\u0644\u064a", "\u0641\u0627\u0637\u0645\u0629 \u062d\u0633\u0646"),
    "Chinese": ("\u738b\u5c0f\u660e\u5148", "\u60a3\u8005\u7f16\u53f7"),
    "Devanagari": ("\u0930\u093e\u092e \u0915\u0941\u092e\u093e\u0930",
                   "\u0938\u0940\u0924\u093e \u0926\u0947\u0935\u0940"),
    "Thai": ("\u0e2a\u0e21\u0e0a\u0e32\u0e22 \u0e43\u0e08\u0e14\u0e35", "\u0e1c\u0e39\u0e49\u0e1b\u0e48\u0e27\u0e22"),
}  # fmt: skip
FONTS = {
    "Chinese": "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "Devanagari": "/usr/share/fonts/truetype/lohit-devanagari/Lohit-Devanagari.ttf",
    "Thai": "/usr/share/fonts/opentype/tlwg/Garuda.otf",
}
KINDS = (
    *(("Latin", size_px, "light", 0) for size_px in (8, 10, 12, 16, 24, 40)),
    *(("Latin", size_px, "dark", 0) for size_px in (8, 12, 24)),
    *(("Latin", 12, colour, 0) for colour in ("yellow", "green")),
    *(("Latin", size_px, "light", degrees) for size_px in (12, 24) for degrees in (90, 270)),
    ("Latin", 12, "dark", 90),
    ("Latin", 16, "light", 180),
    ("Latin", 16, "light", 45),
    *((script, size_px, "light", 0) for script in WORDS if script != "Latin" for size_px in (12, 20)),
)


def main() -> None:
    """Measures, and writes runs/bench/deidentify.json."""
    files = list(_photographs())
    num_cores = len(os.sched_getaffinity(0))
    rows = []
    with ProcessPoolExecutor(num_cores) as pool:
        alarms = list(pool.map(_has_text, files[:NUM_CLEAN]))
        rows.append(Row(f"photographs without text kept back, of {len(alarms)}", sum(alarms), "photographs"))
        print(rows[-1], flush=True)  # it takes minutes
        chosen = files[:: max(1, len(files) // NUM_TEXT)][:NUM_TEXT]
        for kind in KINDS:
            if Path(FONTS.get(kind[0], "/")).exists():
                found = [each for found in pool.map(_found, chosen, [kind] * len(chosen)) for each in found]
                script, size_px, colour, degrees = kind
                name = f"{script}, {size_px} px, {colour}, {degrees} degrees: found of {len(found)}"
                rows.append(Row(name, 100 * sum(found) / len(found), "%"))
                print(rows[-1], flush=True)
    timed = (files * (NUM_TIMED // len(files) + 1))[:NUM_TIMED]
    (alone, cpu_s), (together, _) = _photographs_a_second(timed, 1), _photographs_a_second(timed, num_cores)
    rows += [
        Row("decoded, masked, searched for text, encoded and scanned, one process", alone, "photographs/s"),
        Row("the same: processor time, with the start of the process", cpu_s, "s a photograph"),
        Row(f"the same, {num_cores} processes", together, "photographs/s"),
    ]
    write("deidentify", rows, [Ratio(f"{num_cores} processes over one", together / alone, f">= {0.8 * num_cores:.1f}")])


def _photographs() -> Iterator[bytes]:
    folders = ("idrid", "idrid_test", "hrf", "chasedb1")
    if REAL_PHOTOGRAPHS.is_dir():
        paths = [
            path
            for folder in folders
            for place, path in enumerate(sorted((REAL_PHOTOGRAPHS / folder / "traindata").iterdir()))
            if place % 8
        ]
        random.Random(0).shuffle(paths)
        yield from (path.read_bytes() for path in paths)
    else:
        sites = list(phantom.SITES.values())
        for seed in range(NUM_CLEAN):
            image = phantom.draw_eye(sites[seed % len(sites)], seed=seed, size_px=712).image
            yield fundus.encode_jpeg(image, quality=90)


def _has_text(encoded: bytes) -> bool:
    return lettering.has_text(deidentify.mask_surround(fundus.decode_photograph(encoded)))


def _found(encoded: bytes, kind: tuple[str, int, str, int]) -> list[bool]:
    """Plants one line at each of four spots, one at a time, and tells whether the photograph would be kept back."""
    script, size_px, colour, degrees = kind
    image = deidentify.mask_surround(fundus.decode_photograph(encoded))
    field_of_view = fundus.find_field_of_view(image)
    if field_of_view is None:
        return []
    default = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(FONTS.get(script, str(default)), size_px)
    rng = random.Random(len(encoded))
    found = []
    for across, down in SPOTS if degrees in (0, 180) else UPRIGHT_SPOTS:
        text = rng.choice(WORDS[script])
        left, top, right, bottom = font.getbbox(text)
        stencil = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), 0)
        ImageDraw.Draw(stencil).text((2 - left, 2 - top), text, fill=255, font=font)
        stencil = stencil.rotate(degrees, expand=True, resample=Image.Resampling.BICUBIC)
        lettered = Image.fromarray(image)
        x = field_of_view.x_px + (across + rng.uniform(-0.05, 0.05)) * field_of_view.radius_px
        y = field_of_view.y_px + (down + rng.uniform(-0.05, 0.05)) * field_of_view.radius_px
        lettered.paste(COLOURS[colour], (int(x), int(y)), stencil)
        stream = io.BytesIO()
        lettered.save(stream, "JPEG", quality=90)  # as a camera would store it
        found.append(lettering.has_text(np.asarray(Image.open(stream))))
    return found


def _photographs_a_second(files: list[bytes], num_processes: int) -> tuple[float, float]:
    """Returns photographs a second and the processor time of one, in seconds."""
    began_cpu_s = _cpu_s()
    with deidentify.pool(num_processes) as processes:
        list(processes.map(lambda encoded: deidentify.rematerialise(processes, encoded), files[:num_processes]))
        began_s = time.monotonic()
        made = list(processes.map(lambda encoded: deidentify.rematerialise(processes, encoded), files))
        taken_s = time.monotonic() - began_s
    assert sum(not each.code for each in made) > 0.9 * len(made)
    # The processes' own time is known when they have ended, with that of the first photographs and of their start.
    cpu_s = _cpu_s() - began_cpu_s
    return len(files) / taken_s, cpu_s / (len(files) + num_processes)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
