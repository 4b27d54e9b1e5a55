#!/usr/bin/env bash
# Compares the protos with the frozen contract, from the root of the repository, with `buf` on the PATH.
#
# The frozen contract is that of the last release tag, or, before the first release, that of the commit in
# protos/baseline. `git archive` reads it in any clone or worktree that has the commit, however old it is;
# Buf's own reading of `.git` fetches a limited depth.
set -euo pipefail

if tag=$(git describe --tags --match 'v*' --abbrev=0 2>/dev/null); then
  commit=$(git rev-list -n 1 "$tag") source="the tag $tag"
else
  commit=$(cat protos/baseline) source=protos/baseline
fi

if ! git cat-file -e "$commit^{commit}" 2>/dev/null; then
  echo "The contract cannot be checked: this clone lacks the commit '$commit', named by $source." >&2
  if [ "$(git rev-parse --is-shallow-repository)" = true ]; then
    echo "The clone is shallow. Run: git fetch --unshallow --tags" >&2
  else
    echo "Run: git fetch --tags. If that does not help, $source names a wrong commit: correct it." >&2
  fi
  exit 1
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git archive --output "$scratch/contract.tar" "$commit" buf.yaml protos
if ! buf breaking --against "$scratch/contract.tar"; then
  echo "The protos break the clients of ${commit:0:12} ($source)." >&2
  echo "Add fields, methods and files; do not change or remove any." >&2
  exit 1
fi
echo "The protos are compatible with ${commit:0:12} ($source)"
