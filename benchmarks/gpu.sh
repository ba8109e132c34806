#!/usr/bin/env bash
# What a GPU is needed for, in parts of at most MINUTES each. Every result is written as it is measured.
#
#   MODEL=smollm2 DATA=data OUT=results bash benchmarks/gpu.sh [comparison] [training_step] [fleets]
#
# comparison     the runs of method_comparison/ that have no result yet, several at a time
# training_step  a Llama of 1.2 billion parameters, bf16, 1,024 tokens: eager, then compiled
# fleets         steps of fleets with 16 to 4,096 slots, beside those of one adapter alone
#
# MODEL    what the comparison trains: `smollm2`, a model's folder, a GGUF file, or the pieces of one in their order
# DATA     the folder that method_comparison/data.py wrote
# OUT      where the results go (gpu-results)
# WHEELS   a folder of wheels to install into WORK first
# WORK     a folder for the model and the wheels, used again if it is there (a temporary one)
# RUNS     the parts of the comparison (A B more), WORKERS (8) runs at a time; none begins in the last minute
# DONE     a folder of results that need no run (method_comparison/results)
# PYTHON   python3
# TINY     anything: sizes for a test on a CPU
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-gpu-results} work=${WORK:-$(mktemp -d)} python=${PYTHON:-python3} minutes=${MINUTES:-6}
mkdir -p "$out" "$work"
export PYTHONPATH="$work/site:$here/../src:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step="--models llama --device cuda --dtype bf16 --layers 22 --width 2048 --tokens 1024 --rounds 20"
batches="8 4 2" ways="eager compiled" compared=${RUNS:-A B more}
fleets=("minilm --rows 1024 --tokens 32" "smollm2 --rows 512 --tokens 64" "llama-1b --rows 128 --tokens 64")
sizes="--slots 16,256,1024,4096 --rows-a-job 4 --steps 12"
if [ -n "${TINY:-}" ]; then
    step="--models llama --layers 2 --width 32 --vocabulary 50 --tokens 8 --rounds 2 --threads 1"
    batches=2 ways=eager fleets=("minilm --rows 4 --tokens 6") sizes="--slots 2,4 --rows-a-job 2 --steps 2"
fi

seconds() { awk -v minutes="$1" 'BEGIN { print int(60 * minutes) }'; }
share() { awk -v minutes="$minutes" -v share="$1" 'BEGIN { print minutes * share }'; } # of a part, in minutes

# to JSON COMMAND...: a file that is there is whole
to() {
    local file=$1
    shift
    timeout --kill-after=10 "$left" "$python" "$@" > "$file.partial" && mv "$file.partial" "$file" && show "$file"
}

# show JSON: a line for each row
show() {
    "$python" - "$1" <<'PYTHON'
import json, pathlib, sys

path = pathlib.Path(sys.argv[1])
report = json.loads(path.read_text())
for rows in report.get("models", {}).values():
    for row in rows:
        peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 1e9:.2f} GB"
        print(f"{path.stem}, {row['method']}: {1000 * row['seconds']:.1f} ms, {row['ratio']:.3f} times the floor's{peak}")
alone = report.get("alone")
for row in report.get("sizes", []):
    rate = row["jobs"] / row["seconds"]
    print(
        f"{path.stem}, {row['slots']} slots: {1000 * row['seconds']:.1f} ms a step of {row['jobs']} jobs, {rate:.0f} job "
        f"steps a second, {rate * alone['seconds']:.1f} times alone's, peak {row['peak_bytes'] / 1e9:.2f} GB"
    )
PYTHON
}

# the seconds that a part has left, for `timeout`
remain() { left=$((end - $(date +%s))) && [ "$left" -gt 0 ]; }

model() {
    [ -f "$work/model/config.json" ] && return
    local base=$MODEL
    if [ -d "$base" ]; then
        ln -sfn "$(cd "$base" && pwd)" "$work/model"
        return
    fi
    if [[ $base = *' '* ]]; then
        # shellcheck disable=SC2086
        base=$work/model.gguf && cat $MODEL > "$base" || return
    fi
    "$python" -m redpeft export-base "$base" --out "$work/model"
}

comparison() {
    local results=$out/comparison/results
    model || { echo "comparison: MODEL gave no base model"; return 1; }
    mkdir -p "$results"
    cp -n "${DONE:-$here/method_comparison/results}"/*.json "$results" 2> /dev/null
    # shellcheck disable=SC2086
    remain && timeout --kill-after=10 "$left" "$python" "$here/method_comparison/run.py" $compared --base "$work/model" \
        --data "$DATA" --workers "${WORKERS:-8}" --minutes "$(awk "BEGIN { print ($left - 60) / 60 }")" --out "$results"
}

training_step() {
    local way options
    for way in $ways; do
        [ $way = eager ] && options="--minutes $(share 0.3)" || options="--compile --minutes $(share 0.5)"
        for batch in $batches; do # the largest that fits
            # shellcheck disable=SC2086
            remain && to "$out/training_step-$way.json" "$here/training_step.py" $step --batch "$batch" $options --json && break
        done
    done
}

fleets() {
    local fleet
    for fleet in "${fleets[@]}"; do
        # shellcheck disable=SC2086
        remain && to "$out/fleets-${fleet%% *}.json" "$here/fleet.py" slots --model $fleet $sizes --json
    done
}

if [ -n "${WHEELS:-}" ] && [ ! -d "$work/site" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$work/site" "$WHEELS"/*.whl || exit
fi
[ $# -gt 0 ] || set -- comparison training_step fleets
for part in "$@"; do
    start=$(date +%s) end=$(($(date +%s) + $(seconds "$minutes")))
    echo "== $part, at most $minutes minutes"
    "$part"
    echo "== $part: $(($(date +%s) - start)) s"
done
