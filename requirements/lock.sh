#!/usr/bin/env bash
# Resolves pyproject.toml into the two lock files. Called by `make lock`.
#   $1  path of uv        $2  folder with a CPU torch wheel (may be empty: PyTorch's CPU index is asked)
set -euo pipefail
uv=$1 links=${2:-}
cd "$(dirname "$0")/.."

compile() {
    echo "==> requirements/$1.txt"
    "$uv" pip compile pyproject.toml --extra "$1" --extra dev --python-version 3.11 \
        --custom-compile-command "make lock" --quiet --upgrade -o "requirements/$1.txt" "${@:2}"
}

cpu_torch=$(mktemp)
trap 'rm -f "$cpu_torch"' EXIT
echo "torch==2.13.0+cpu" > "$cpu_torch"
if [ -n "$links" ] && compgen -G "$links/torch-*+cpu*.whl" > /dev/null; then
    source_of_torch=(--find-links "$links")
else
    source_of_torch=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi
compile cpu --constraints "$cpu_torch" --excludes requirements/cpu.excludes.txt "${source_of_torch[@]}"
compile gpu
