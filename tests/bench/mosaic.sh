#!/usr/bin/env bash
# Makes (or finds) the environment of mosaicml-streaming, whose pins (numpy < 2.2, transformers < 5) exclude this
# project's; prints the path of its Python last. It lies outside the clone, beside the project's own environments.
set -euo pipefail
versions="torch==2.14.1 torchvision==0.29.1"
streaming="mosaicml-streaming==0.13.0 numpy<2.2 transformers<5 pillow"
digest=$(echo "$versions $streaming" | sha256sum | cut -c1-16)
place=${GRETFOUND_ENVIRONMENTS:-$HOME/.cache/gretfound/environments}/mosaic-$digest
if [ ! -e "$place/complete" ]; then
    rm -rf "$place"
    python3.11 -m venv "$place"
    "$place/bin/pip" install --quiet --disable-pip-version-check $versions >&2
    "$place/bin/pip" install --quiet --disable-pip-version-check $versions $streaming >&2
    touch "$place/complete"
fi
echo "$place/bin/python"
