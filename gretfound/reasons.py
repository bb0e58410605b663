"""Reasons: what the hub says of a package for each code that a confined process may answer.

A process that reads a stranger's bytes may have been taken over by them, so its words are not repeated: it answers with
a code, and a code that is not in this table counts as a crash. `docs/sites.md` says at length what a site does.
"""

_SEND_AGAIN = "send the package again"
_SEAL_AGAIN = "seal the package again with gretfound-site"
_UPDATE = "update gretfound-site and contribute again"
_ASK = "ask the hub, which has put the package aside"

WORDS = {
    # unseal
    "NOT_SEALED": "it is not sealed with age; send the file that ends in .age",
    "NOT_FOR_THIS_HUB": "it is sealed for others than this hub; seal it with the card of this hub",
    "DAMAGED": f"it was changed or cut after it was sealed; {_SEND_AGAIN}",
    "TOO_LARGE": f"it, or a part of it, is larger than a package may be; {_SEAL_AGAIN}",
    # signatures, roster and days
    "ONE_SIGNATURE": "it needs the container's and the steward's signature; sign it",
    "SAME_KEY_TWICE": f"the container and the steward need keys of their own; {_SEAL_AGAIN}",
    "BAD_SIGNATURE": f"its signatures are not of the keys or the content that it names; {_SEAL_AGAIN}",
    "BAD_ENVELOPE": f"its signatures cannot be read; {_SEAL_AGAIN}",
    "ROSTER_EXPIRED": "the hub's roster of sites is not in force; the hub has to renew it, the package waits",
    "UNKNOWN_SITE": "the hub does not know this site; send it the site's card, the package waits",
    "UNKNOWN_KEY": "the hub does not have a key that signed it; send it the site's card, the package waits",
    "SITE_SUSPENDED": f"the hub takes nothing of this site at present; {_ASK}",
    "KEY_REVOKED": "a key that signed it was revoked; replace it, send the new card and contribute again",
    "KEY_EXPIRED": "a key that signed it is too old; replace it, send the new card and contribute again",
    "PACKAGE_EXPIRED": "today is not among the days on which it may be taken in; check the clock, contribute again",
    # manifest and tar
    "BAD_MANIFEST": f"its manifest is not as this version writes it; {_UPDATE}",
    "UNKNOWN_VERSION": f"its manifest is of another version; {_UPDATE}",
    "NOT_ALLOWED": f"it holds, or declares, something that a package of its form may not; {_SEAL_AGAIN}",
    "TOO_MANY_MEMBERS": f"it declares more members than a package may have; {_SEAL_AGAIN}",
    "OUT_OF_ORDER": f"its members are not in order, each once; {_SEAL_AGAIN}",
    "MISSING_MEMBER": f"a member that is declared or required is not there; {_SEAL_AGAIN}",
    "TRUNCATED": f"the archive in it ends too early; {_SEAL_AGAIN}",
    "NOT_CANONICAL": f"the archive in it is not as `seal` writes it; {_SEAL_AGAIN}",
    "NOT_A_REGULAR_FILE": f"the archive in it has a link, device, folder or extension; {_SEAL_AGAIN}",
    "UNSAFE_NAME": f"a name in the archive is not a plain relative path; {_SEAL_AGAIN}",
    "TRAILING_BYTES": f"bytes follow the end of the archive in it; {_SEAL_AGAIN}",
    "SIZE_MISMATCH": f"a member is not as long as the manifest says; {_SEAL_AGAIN}",
    "DIGEST_MISMATCH": f"a member is not what the manifest says; {_SEAL_AGAIN}",
    "WRONG_KIND": f"a member is not of the kind that its name says; {_SEAL_AGAIN}",
    # shards
    "SHARD_FORMAT": f"a shard is not readable, or not in this version's format; {_UPDATE}",
    "SITE_MISMATCH": f"a row names another site or origin than the manifest; {_UPDATE}",
    "NOT_DEIDENTIFIED": f"a row is not de-identified: a code, a method or a column is not as it must be; {_UPDATE}",
    "CELL_NOT_TOLD": f"a row holds a value or words that its summary does not tell; {_UPDATE}",
    "PATIENT_IN_SYNTHETIC": f"a drawn photograph has a patient, a visit or a year; {_UPDATE}",
    "COUNT_MISMATCH": f"the manifest counts other photographs or patients than the package holds; {_UPDATE}",
    "IMAGE_NOT_BARE": f"a shard holds an image with more than its pixels; {_UPDATE}",
    "NO_READABLE_IMAGES": "no photograph of the package is readable; contribute again",
    "IMAGE_NOT_A_PHOTOGRAPH": f"a shard holds an image that is neither JPEG nor PNG; {_UPDATE}",
    "IMAGE_TOO_LARGE": f"a shard holds an image of too many bytes; {_UPDATE}",
    "IMAGE_TOO_MANY_PIXELS": f"a shard holds an image of too many pixels; {_UPDATE}",
    "IMAGE_SEVERAL_FRAMES": f"a shard holds an image of several frames; {_UPDATE}",
    "IMAGE_BEYOND_LIMITS": f"a shard holds an image that takes too much memory to open; {_UPDATE}",
    "IMAGE_BAD_PROFILE": f"a shard holds an image with a damaged colour profile; {_UPDATE}",
    # summary
    "BAD_SUMMARY": f"the metadata summary is not of this version; {_UPDATE}",
    "POLICY": "its summary was made by another disclosure policy than this hub admits; contribute again",
    "DISCLOSURE": f"its summary does not keep the disclosure policy; {_UPDATE}",
    "BAD_REPORT": f"the disclosure report is not that of the summary; {_UPDATE}",
    # training and weights
    "BAD_TRAINING": f"the training's settings or its course are not as this version writes them; {_UPDATE}",
    "ADAPTER_TERMS": f"what the weights say about themselves is not readable or not possible; {_UPDATE}",
    "W0_HEADER": f"the weights' header is not JSON, or too long; {_UPDATE}",
    "W1_DUPLICATE_KEY": f"the weights' header has a key twice; {_UPDATE}",
    "W1_COUNT": f"there are more or fewer tensors than follow from base, rank and targets; {_UPDATE}",
    "W2_TENSORS": f"a required tensor is missing, or an entry is none; {_UPDATE}",
    "W2_SHAPE": f"a tensor has another shape than follows from base, rank and targets; {_UPDATE}",
    "W2_OFFSETS": f"the weights have holes, overlap, or another length than their shapes; {_UPDATE}",
    "W3_NOT_FINITE": "the weights hold numbers that are not finite; train again",
    "W6_METADATA": f"there are words beside the weights; {_UPDATE}",
    "W7_DTYPE": f"the weights are in another number format than the required one; {_UPDATE}",
    # what a generator's package states of its privacy
    "GATE_MISSING": "the package holds no report of the privacy gate; contribute again",
    "GATE_MALFORMED": f"the gate's report is not of this version; {_UPDATE}",
    "CANARY_MISSING": f"the weights were trained without canaries; {_UPDATE}",
    "CANARY_REVEAL": f"what the package says of its canaries is not of this version; {_UPDATE}",
    "DP_LEDGER": "the ledger of the private training is not of this version; report it",
    # the process itself
    "LIMIT_MEMORY": f"opening it took more memory than the hub allows for one package; {_ASK}",
    "LIMIT_CPU": f"opening it took more processor time than the hub allows for one package; {_ASK}",
    "LIMIT_FILE_SIZE": f"it unpacks to a larger file than the hub allows; {_ASK}",
    "LIMIT_OPEN_FILES": f"opening it took more open files than the hub allows for one package; {_ASK}",
    "LIMIT_TIME": f"opening it took more time than the hub allows for one package; {_ASK}",
    "CRASHED": "the process that opened it did not end well; an operator of the hub looks at the package",
}
