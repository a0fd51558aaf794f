#!/usr/bin/env bash
# The whole of Janus in miniature: collect, train, serve, evaluate, each by its own job, on two CPU cores.
# Called by `make demo`. Everything it writes lies under runs/miniature of the current folder, or where JANUS_DEMO_FOLDER
# says, which may be on an object storage (s3://bucket/miniature); the logs stay here. A second run starts over.
# Arguments go to jobs.train: `bash jobs/miniature.sh --set epochs=4` trains half as long.
set -euo pipefail

recipes=$(dirname "$0")/recipes
folder=${JANUS_DEMO_FOLDER:-runs/miniature}
log=runs/miniature/logs
port=${JANUS_DEMO_PORT:-8000}
mkdir -p "$log"
server=""
declare -a names times

stop_server() {
    if [ -n "$server" ]; then
        kill -TERM "$server" 2> /dev/null || true
        wait "$server" 2> /dev/null || true
        server=""
    fi
}
trap stop_server EXIT

step() {  # step NAME COMMAND...: runs it, and remembers how long it took
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    names+=("$name")
    times+=($((SECONDS - began)))
}

start_server() {
    : > "$log/serve.log"
    python -m jobs.serve "$recipes/miniature_serve.toml" --set port=$port --set models.0.path="$folder/sft/model" --set models.1.path="$folder/base" > "$log/serve.log" 2>&1 &
    server=$!
    local waited=0
    until grep --quiet '^serve: ready' "$log/serve.log"; do
        if ! kill -0 "$server" 2> /dev/null; then
            tail -n 5 "$log/serve.log" >&2
            exit 1
        fi
        sleep 1
        waited=$((waited + 1))
        if [ $((waited % 10)) = 0 ]; then echo "serve: loading two models into vLLM, ${waited} s (about a minute on two cores)"; fi
    done
    echo "serve: http://127.0.0.1:$port is ready (log: $log/serve.log)"
}

began=$SECONDS
step instructions python -m jobs.miniature_instructions "$recipes/miniature_instructions.toml" --set output_path="$folder/instructions.jsonl"
step collect python -m jobs.collect "$recipes/miniature_collect.toml" --if-exists overwrite --set sources.0.path="$folder/instructions.jsonl" --set output_dir="$folder/collection"
step base-model python -m jobs.miniature_model "$recipes/miniature_model.toml" --if-exists overwrite --set collection="$folder/collection" --set output_dir="$folder/base"
step bench python -m jobs.miniature_bench "$recipes/miniature_bench.toml" --set collection="$folder/collection" --set output_path="$folder/bench.jsonl"
step train python -m jobs.train "$recipes/miniature_sft.toml" --if-exists overwrite --set collection="$folder/collection" --set base_model="$folder/base" --set output_dir="$folder/sft" "$@"
step serve start_server
step evaluate python -m jobs.evaluate "$recipes/miniature_evaluate.toml" --if-exists overwrite --set bench="$folder/bench.jsonl" --set output_dir="$folder/report" --set policy.base_url=http://127.0.0.1:$port/v1
stop_server

printf '\n%-14s %s\n' step seconds
for index in "${!names[@]}"; do printf '%-14s %7d\n' "${names[$index]}" "${times[$index]}"; done
printf '%-14s %7d\n' total $((SECONDS - began))
printf '\nReport: %s/report/index.html\n' "$folder"
echo "Chat:   python -m jobs.serve $recipes/miniature_serve.toml (then open http://127.0.0.1:8000)"
