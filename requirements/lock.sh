#!/usr/bin/env bash
# Resolves pyproject.toml into the two lock files. Called by `make lock`.
#   $1  path of uv        $2  folders that may hold a CPU torch wheel (none does: PyTorch's CPU index is asked)
set -euo pipefail
uv=$1 links=${2:-}
cd "$(dirname "$0")/.."

compile() {
    echo "==> requirements/$1.txt"
    "$uv" pip compile pyproject.toml --extra "$1" --extra dev --python-version 3.11 \
        --custom-compile-command "make lock" --quiet ${UPGRADE---upgrade} --excludes requirements/dev.excludes.txt -o "requirements/$1.txt" "${@:2}"
}

cpu_torch=$(mktemp)
trap 'rm -f "$cpu_torch"' EXIT
echo "torch==2.13.0+cpu" > "$cpu_torch"
source_of_torch=(--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
for folder in $links; do
    if compgen -G "$folder/torch-*+cpu*.whl" > /dev/null; then source_of_torch=(--find-links "$folder"); fi
done
compile cpu --constraints "$cpu_torch" --excludes requirements/cpu.excludes.txt "${source_of_torch[@]}"
compile gpu
