"""Every error that gretfound raises about the outside world, sorted by who must act.

::

    GretfoundError
      ConfigError             the operator: a key, a value or a combination is wrong
      StorageError            the operator: an object is absent, unreadable or not what its digest says
      LineageError            the operator: a record does not descend from what it claims
      ContributionRejected    the site: unsigned, unsafe, unreadable or of the wrong kind
      NonFiniteLoss           the researcher: training diverged; names the last good checkpoint
      ReleaseBlocked          the committee: a gate did not pass (gate, found, required)

A message says what was found, what was required and what to do. It never contains patient data, a photograph's file
name or a metadata value.
"""


class GretfoundError(Exception):
    """The root: catch this to catch everything that gretfound reports about the outside world."""


class ConfigError(GretfoundError):
    """A configuration key, value or combination is wrong; lists every fault at once."""


class StorageError(GretfoundError):
    """An object is absent, unreadable or not what its digest says."""


class LineageError(GretfoundError):
    """A record does not descend from what it claims."""


class ContributionRejected(GretfoundError):
    """A contribution is unsafe, unreadable or of the wrong kind.

    Args:
        code: The reason code, in capitals and stable, for example ``DIGEST_MISMATCH``.
        message: What was found, what was required and what the site can do.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code

    def __reduce__(self) -> tuple[type["ContributionRejected"], tuple[str, str]]:
        # Ray carries errors between processes by pickling; the default would drop the code.
        return type(self), (self.code, str(self).removeprefix(f"{self.code}: "))


class NonFiniteLoss(GretfoundError):
    """Training diverged; the message names the last good checkpoint."""


class ReleaseBlocked(GretfoundError):
    """A gate before a release did not pass.

    Args:
        gate: The gate's name.
        found: What was found.
        required: What was required.
    """

    def __init__(self, gate: str, found: str, required: str) -> None:
        super().__init__(f"gate {gate!r} did not pass: found {found}; required {required}")
        self.gate, self.found, self.required = gate, found, required

    def __reduce__(self) -> tuple[type["ReleaseBlocked"], tuple[str, str, str]]:
        return type(self), (self.gate, self.found, self.required)
