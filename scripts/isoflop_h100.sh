#!/usr/bin/env bash
# The real ladder from nothing: data, sweep, fit, sealed forecasts, the runs they are about, scores.
#
#     scripts/isoflop_h100.sh OUT [TEXT...]
#
# From the repository's root, on a machine whose GPUs it may fill. TEXT: files, folders and archives to train on, beside
# the installed packages. Works in sweeps/h100; OUT gets results.tar.gz (rows, fits, forecasts, scores, metrics, logs) and
# log, brought up to date after every phase. Phases have limits (SWEEP_SECONDS, TARGET_SECONDS), so that what is there
# survives; run again it goes on.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) && shift || exit 2
work=sweeps/h100 configs=configs/sweeps/isoflop_h100
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p $work
exec > >(tee -a "$out/log") 2>&1
maxlm() { python3 -m maxlm "$@"; }
say() { printf '== %4d s  %s\n' $SECONDS "$*"; }
pack() {
    local found
    found=$(cd $work && find . -maxdepth 3 \( -name data -prune -o -name checkpoints -prune -o -name ledger.jsonl -prune \
        -o -type f -not -name '.*' -not -name loss.png -print \))
    (cd $work && tar czf "$out/results.tar.gz.partial" data/manifest.json $found 2>/dev/null)
    mv "$out/results.tar.gz.partial" "$out/results.tar.gz"
    for name in runs.jsonl curves.jsonl; do cp $work/$name "$out/" 2>/dev/null; done
}
trap 'pack; kill $(jobs -p) 2>/dev/null' EXIT
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || gpus=1
nvidia-smi --query-gpu=timestamp,index,utilization.gpu,memory.used --format=csv,noheader -l 5 > $work/gpu.log 2>&1 &

say "data, and beside it a run of 20 steps: what is broken shows now"
timeout 120 python3 -m maxlm data prepare "$@" --source installed-packages --out $work/data --tokenizer bytes \
    --seq-len 512 --heldout-fraction 0.007 & preparing=$!
CUDA_VISIBLE_DEVICES=0 timeout 150 python3 -m maxlm train ${configs}_target.py --run-dir $work/smoke --set data.path=none \
    --set data.source=python-stdlib --set train.num_steps=20 --set schedule.warmup_steps=1 > $work/smoke.log 2>&1
smoke=$?
tail -n 4 $work/smoke.log
wait $preparing || { say "the data could not be prepared"; exit 1; }
[ $smoke = 0 ] || { say "the run of 20 steps ended with $smoke"; exit 1; }

say "sweep"
timeout -k 60 "${SWEEP_SECONDS:-270}" python3 -m maxlm sweep $configs.py --out $work --jobs $((4 * gpus))
say "the sweep ended with $?"; pack

where='rate_factor==1'
maxlm fit $work/runs.jsonl --law chinchilla --where "$where" --out $work/fit & fitting=$!
for name in target target_wide; do
    maxlm forecast seal $work/runs.jsonl --law chinchilla --where "$where" --config ${configs}_$name.py \
        --out $work/forecast_$name || say "no forecast of $name"
done
say "sealed"; wait $fitting; pack

number=0 running=()
for name in target target_wide; do
    CUDA_VISIBLE_DEVICES=$((number % gpus)) XLA_PYTHON_CLIENT_MEM_FRACTION=0.45 timeout -k 20 "${TARGET_SECONDS:-180}" \
        python3 -m maxlm train ${configs}_$name.py --run-dir $work/$name > $work/$name.log 2>&1 & running+=($!)
    number=$((number + 1))
done
for one in "${running[@]}"; do wait "$one"; say "a forecast run ended with $?"; pack; done
for name in target target_wide; do
    tail -n 2 $work/$name.log
    maxlm forecast score $work/forecast_$name --run-dir $work/$name
done
maxlm fit $work/runs.jsonl --law isoflop --where "$where" --out $work/fit_isoflop
say "done"
