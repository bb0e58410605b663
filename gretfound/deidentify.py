"""De-identification of photographs by making them anew: pixels in, a bare PNG out; nothing else of a file survives.

The policy deid/1 goes further: DICOM headers, text inside the field of view, date shifting and the exit scan have their
place here and are not done yet. The result is pseudonymised, never anonymous: a retina identifies a person.
"""

import hashlib
import hmac

import numpy as np

from gretfound import fundus


def rematerialise(encoded: bytes, *, mask_outside: bool = True) -> bytes:
    """Decodes a photograph and encodes its pixels as a PNG that holds nothing else.

    Args:
        encoded: JPEG, PNG or TIFF bytes.
        mask_outside: Whether everything outside the field of view, where cameras print names and dates, is blacked out.
            A photograph without a visible field of view is kept whole.

    Raises:
        fundus.UnreadablePhotograph: If it cannot be decoded.
    """
    image = fundus.decode_photograph(encoded)
    field_of_view = fundus.find_field_of_view(image) if mask_outside else None
    if field_of_view is not None:
        inside = fundus.inside_mask(image.shape, field_of_view)
        image = np.where(inside[:, :, None], image, np.uint8(0))
    return fundus.encode_png(image)


def pseudonym(site_key: bytes, patient: str) -> str:
    """Returns a patient's pseudonym: a keyed digest that only the holder of the site's key can make again.

    Args:
        site_key: At least 16 secret bytes that never leave the site.
        patient: The site's own code for the person.

    Returns:
        32 hex digits: the first 16 bytes of HMAC-SHA256.

    Raises:
        ValueError: If the key is too short.
    """
    if len(site_key) < 16:
        raise ValueError(f"found a site key of {len(site_key)} bytes; required at least 16")
    return hmac.new(site_key, patient.encode(), hashlib.sha256).digest()[:16].hex()
