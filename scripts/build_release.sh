#!/bin/sh
# Build wheel and sdist of the commit that is checked out: scripts/build_release.sh PYTHON OUT
#
# Files come from git, not from the folder, and times from the commit, so one commit gives one sequence of bytes.
set -eu
python=$(command -v "$1")
mkdir -p "$2"
out=$(cd "$2" && pwd)
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
git archive HEAD | tar -x -C "$source"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
(cd "$source" && "$python" -m hatchling build -d "$out")
(cd "$out" && sha256sum paceline-*)
