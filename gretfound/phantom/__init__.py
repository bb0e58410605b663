"""Drawn colour fundus photographs (CFPs) whose truth is known: the demo's sites, the tests' data, a positive control.

An eye is a pure function of (site, patient seed, eye, size). Disease, age and sex leave marks of structure (lesions,
cup, reflexes, distances), not of mean colour: a linear probe on raw pixels fails where an encoder can succeed.

    python -m gretfound.phantom aster folder --num-images 200 --size-px 224 --seed 0
"""

from gretfound.phantom.eye import Phantom, PhantomTruth, draw_eye
from gretfound.phantom.folder import list_eyes, write_site
from gretfound.phantom.population import SITES, PhantomPatient, PhantomSite, draw_patient

__all__ = [
    "SITES",
    "Phantom",
    "PhantomPatient",
    "PhantomSite",
    "PhantomTruth",
    "draw_eye",
    "draw_patient",
    "list_eyes",
    "write_site",
]
