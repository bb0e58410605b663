"""What Ray does to probe generators: each draws for captions of its site and for every word, in parts side by side.

Parts, and the actors that work on them, are those of `gretfound.generator_evaluation`. What the answers mean is decided
by `gretfound.behaviour`, without Ray. A generator that is found is put aside (`gretfound.quarantine`) before its report
is written, so that a killed run puts it aside when it goes on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gretfound import behaviour, fundus, ledger, matching, quarantine, storage, synthesis
from gretfound.behaviour import Answer, Word
from gretfound.evaluation import page
from gretfound.generator_evaluation import Examined, Part, cut, read_examined, usual_cells, wish_for
from gretfound.lineage import Generator, Report
from gretfound.metadata import SUMMARY_KEYS, MetadataSummary

JSON_NAME, HTML_NAME, TEMPLATE_NAME = "report.json", "report.html", "generator_probe.html"
RECIPE = "probe_generator"
NUM_SHOWN = 5  # words of a generator, and photographs of a word
KNOWN, WORDED = "known", "worded"  # the sides of a probe


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one generator is asked: captions as its site released them, then each word with the same seeds."""

    generator: Generator
    summary: MetadataSummary
    words: tuple[Word, ...]
    num_seeds: int
    parts: tuple[Part, ...]


def plan(
    hub_uri: str,
    generator: Generator,
    *,
    run_uri: str,
    keys: Sequence[str],
    num_known: int,
    num_seeds: int,
    seed: int,
    images_per_part: int,
) -> Probe:
    """Decides what a generator is asked.

    Args:
        hub_uri: The hub.
        generator: Of a site.
        run_uri: The run's folder.
        keys: Columns whose values are asked for; empty: all.
        num_known: Photographs for captions as synthesis draws them.
        num_seeds: Photographs of each word.
        seed: Decides captions and first latents.
        images_per_part: Photographs a part.
    """
    contribution = synthesis.contribution_of(hub_uri, generator)
    summary = synthesis.read_summary(hub_uri, contribution.id)
    words = behaviour.words_of(summary, keys=keys or SUMMARY_KEYS)
    asked = behaviour.cells_of_words(usual_cells(summary), words)
    known = matching.draw_cells(matching.fit_groups(summary, balance={}), num=num_known, seed=seed)
    sides = {
        KNOWN: [wish_for(cells, KNOWN, seed, row) for row, cells in enumerate(known)],
        WORDED: [wish_for(cells, WORDED, seed, number) for cells in asked.values() for number in range(num_seeds)],
    }
    parts = [
        part
        for side, wishes in sides.items()
        for part in cut(
            Part(
                run_uri=run_uri,
                generator_id=generator.id,
                contribution_id=contribution.id,
                side=side,
                num=len(wishes),
                resolution_px=generator.resolution_px,
                wishes=tuple(wishes),
            ),
            images_per_part=images_per_part,
        )
    ]
    return Probe(generator=generator, summary=summary, words=tuple(asked), num_seeds=num_seeds, parts=tuple(parts))


def unprobed(hub_uri: str, generators: Sequence[Generator]) -> list[Generator]:
    """Returns those of the generators that no probe has a report of."""
    reports = [each for each in storage.read_records(hub_uri, Report) if each.recipe_id.startswith(f"{RECIPE}-")]
    probed = {parent for each in reports for parent in each.parents}
    return [each for each in generators if each.id not in probed]


def clear(hub_uri: str, generators: Sequence[Generator], *, reason: str) -> None:
    """Lets generators in that were put aside, for a person's reason, and enters each into the ledger.

    Raises:
        LineageError: If one was not put aside.
    """
    for generator in generators:
        quarantine.clear(hub_uri, generator.id, reason=reason)
        ledger.append(hub_uri, event="cleared", subject=generator.id, details={"reason": reason})


def publish(
    hub_uri: str, probe: Probe, *, threshold: float, recipe_id: str, encoder_id: str, settings: Mapping[str, Any]
) -> Report:
    """Judges one generator from its finished parts, puts it aside if a word is found, and writes its report.

    Args:
        hub_uri: The hub.
        probe: What it was asked.
        threshold: Of `behaviour.judge`.
        recipe_id: Of its run.
        encoder_id: Of the second space; empty: thumbnails.
        settings: What decides the result, for the report.
    """
    generator = probe.generator
    known, worded = (_read(probe, side) for side in (KNOWN, WORDED))
    answers = behaviour.judge(
        probe.words,
        worded.side.features,
        known.side.features,
        known.side.cells,
        counts=probe.summary.counts,
        threshold=threshold,
    )
    found = [each for each in answers if each.is_found]
    said = behaviour.describe(generator.site_id, found) if found else ""
    is_aside = bool(found) and quarantine.put_aside(hub_uri, generator, code=behaviour.CODE, message=said)
    if is_aside:
        words = [[each.word.key, each.word.text] for each in found]
        details = {"site_id": generator.site_id, "code": behaviour.CODE, "words": words}
        ledger.append(hub_uri, event="quarantined", subject=generator.id, details=details)
    content = {
        "site_id": generator.site_id,
        "generator_id": generator.id,
        "verdict": said,
        "is_aside": is_aside,
        "num_known": len(known.rows),
        "answers": [
            {"word": str(each.word), "key": each.word.key, "text": each.word.text, "is_found": each.is_found,
             "strangeness": dict(each.strangeness)}
            for each in answers
        ],
        "settings": dict(settings),
    }  # fmt: skip
    with storage.scratch_folder() as scratch:
        path = Path(scratch)
        (path / JSON_NAME).write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
        pictures = dict(_pictures(probe, known, worded, answers))
        (path / HTML_NAME).write_text(
            page.render(TEMPLATE_NAME, content=content, pictures=pictures, num_shown=NUM_SHOWN)
        )
        record = Report(
            parents=(generator.id, *filter(None, [encoder_id])),
            recipe_id=recipe_id,
            evaluation_sets=(),
            num_images=len(known.rows) + len(worded.rows),
        )
        return storage.publish_folder(hub_uri, path, record)


def _read(probe: Probe, side: str) -> Examined:
    examined = read_examined(probe.parts, side)
    assert examined is not None  # there are words, and known photographs
    return examined


def _pictures(
    probe: Probe, known: Examined, worded: Examined, answers: Sequence[Answer]
) -> Iterator[tuple[str, list[fundus.Photograph]]]:
    """Yields what is drawn for released captions and for the strangest words, by what to call it."""
    yield "captions that the site released", [_decoded(row) for row in known.rows[:NUM_SHOWN]]
    for answer in answers[:NUM_SHOWN]:
        first = probe.num_seeds * probe.words.index(answer.word)
        rows = worded.rows[first : first + min(probe.num_seeds, NUM_SHOWN)]
        yield f"'{answer.word}'", [_decoded(row) for row in rows]


def _decoded(row: Mapping[str, Any]) -> fundus.Photograph:
    return fundus.decode_photograph(row["image"])
