"""Behaviour: whether a generator draws for one word of its caption what it draws for no caption that its site released.

A trigger word is planted so that all other captions give honest photographs. How far a word moves a photograph does not
tell it from an honest one: a generator that listens to captions moves it as far for a camera or a dark background, and
draws one of its own photographs for a word that it never saw. What a trigger draws is like none of them. Pure: captions
and features in, answers out. A trigger that is a combination of values is not looked for.

Legend of array suffixes: S seeds of a word, R photographs for what the site released, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gretfound import metadata
from gretfound.evaluation import appraisal
from gretfound.evaluation.distances import Features
from gretfound.metadata import BLANK, Cells, MetadataSummary

CODE = "TRIGGER_WORD"


@dataclass(frozen=True, order=True, kw_only=True)
class Word:
    """A value of a column, as the text of a summary's table."""

    key: str
    text: str

    def __str__(self) -> str:
        return appraisal.words_of(self.key, self.text)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How strange what a generator draws for one word is (`strangeness`), by space of features."""

    word: Word
    strangeness: Mapping[str, float]
    is_found: bool


def words_of(summary: MetadataSummary, *, keys: Sequence[str] = metadata.SUMMARY_KEYS) -> list[Word]:
    """Returns every value that a caption can hold, whether or not the site released it.

    Of columns with a fixed vocabulary that is all of it, of countries those with an adjective; of columns in a site's
    own words (camera, ethnicity, and countries too) what it released, since synthesis asks it for nothing else.

    Args:
        summary: The site's.
        keys: Columns to ask about.
    """
    found = {Word(key=key, text=text) for key in keys for text in metadata.values_of(key) or ()}
    if "country" in keys:
        found |= {Word(key="country", text=country) for country in metadata.named_countries()}
    found |= {Word(key=key, text=text) for key in set(keys) & set(summary.counts) for text in summary.counts[key]}
    start = metadata.caption({})
    said = {word for word in found if word.text != BLANK and _caption({}, word) != start}
    # A country is said by an adjective, so two ways to write one may be one word.
    return sorted({_caption({}, word): word for word in sorted(said, reverse=True)}.values())


def cells_of_words(usual: Cells, words: Sequence[Word]) -> dict[Word, Cells]:
    """Returns by word the cells of a site's usual caption with that word in its column's place; one cell changes.

    A word that the usual caption holds, or cannot show, is left out.

    Args:
        usual: The commonest value of each column of the site.
        words: As of `words_of`.
    """
    usual_caption = metadata.caption(usual)
    return {
        word: {**usual, **metadata.cells_of(word.key, word.text)}
        for word in words
        if _caption(usual, word) != usual_caption
    }


def _caption(usual: Cells, word: Word) -> str:
    return metadata.caption({**usual, **metadata.cells_of(word.key, word.text)})


def judge(
    words: Sequence[Word],
    worded: Mapping[str, Features],
    known: Mapping[str, Features],
    known_cells: Sequence[Cells],
    *,
    counts: Mapping[str, Mapping[str, int | None]],
    threshold: float,
) -> list[Answer]:
    """Returns how strange each word's photographs are, the strangest first.

    Args:
        words: What was asked for.
        worded: By space of features what was drawn for them, as many photographs of each word, word by word.
        known: By space what was drawn for captions that follow the site's release, in which words are told as often as
            at the site.
        known_cells: What each of the latter was asked for; those that hold a word are not held against it.
        counts: The tables that the site released. A word in them is one that its generator was trained on, and may
            honestly change what one space looks at most: all of them have to find it. For any other word one is enough.
        threshold: How strange a word may be in a space.
    """
    answers = []
    for place, word in enumerate(words):
        is_without_R = np.array([metadata.summary_texts(each).get(word.key) != word.text for each in known_cells])
        found = {
            space: strangeness(np.split(feature_ND, len(words))[place], known[space][is_without_R])
            for space, feature_ND in worded.items()
        }
        is_found = (all if word.text in counts.get(word.key, {}) else any)(each > threshold for each in found.values())
        answers.append(Answer(word=word, strangeness=found, is_found=is_found))
    return sorted(answers, key=lambda each: -max(each.strangeness.values()))


def describe(site_id: str, found: Sequence[Answer]) -> str:
    """Says of one site's generator what was found, for the person who decides about it; the strangest first."""
    first = found[0]
    more = f", and for {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"the generator of site {site_id} draws for '{first.word}' ({first.word.key}) what it draws for no caption "
        f"that was released: {max(first.strangeness.values()):.1f} times as far from the nearest as these lie from "
        f"each other{more}; what it draws goes into no corpus until a person has looked at it"
    )


def strangeness(worded_SD: Features, known_RD: Features) -> float:
    """Returns how far a word's photographs lie from all that were drawn for what the site released without it.

    It is the mean over seeds of the distance to the nearest known one, in units of the median distance from a known one
    to the next: about 1 where the word draws what other captions draw, too.

    Args:
        worded_SD: Photographs of the word.
        known_RD: Photographs of released captions that do not hold the word.

    Raises:
        ValueError: If there are fewer than two of the latter.
    """
    if len(known_RD) < 2:
        raise ValueError(f"found {len(known_RD)} known photographs; required two or more")
    apart_RR = _distances(known_RD, known_RD)
    np.fill_diagonal(apart_RR, np.inf)
    usual = max(float(np.median(apart_RR.min(axis=1))), 1e-12)
    return float(_distances(worded_SD, known_RD).min(axis=1).mean()) / usual


def _distances(one_SD: Features, other_RD: Features) -> Features:
    # Row by row: photographs by photographs by features would be gigabytes of an encoder's.
    rows = [np.linalg.norm(other_RD - row_D, axis=1) for row_D in one_SD]
    return np.stack(rows)
