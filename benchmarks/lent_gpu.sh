#!/usr/bin/env bash
# Jobs for a machine with one GPU that is lent for minutes: each part keeps its time limit, and leaves its results so
# far in OUT, in few and small files.
#
#     OUT=/tmp/out KALMANNORM_DATA=../shared/data bash benchmarks/lent_gpu.sh tests
#     OUT=/tmp/out bash benchmarks/lent_gpu.sh overhead
#     OUT=/tmp/out bash benchmarks/lent_gpu.sh throughput
#     OUT=/tmp/out bash benchmarks/lent_gpu.sh speed 300 'step/resnet50/*'
#     OUT=/tmp/out bash benchmarks/lent_gpu.sh study batch-sizes-gpu 500 14
#
# tests: tests that need a GPU. overhead: CPU time of a step, by part. throughput: steps per second, by number of
# processes. speed SECONDS PATTERN...: cases of `python -m benchmarks`, added to those in RUNS/cuda.csv.
# study NAME SECONDS WORKERS: continues the study in RUNS (default runs/gpu), with CUDA's multi-process service, and
# packs its runs. Checkpoints of unfinished runs are packed in pieces: join them with cat, and unpack them into RUNS
# before a later session. On another machine with the same torch, `kalmannorm run NAME --collect --output RUNS` makes
# the tables.
# ONLY='kn-1*,brn-2' selects arms. GROW=1 trusts the runs in docs/results, and trains only runs that are not there
# (--collect then needs --grow too, and that folder's CSV files). SCALE=tiny rehearses a study on a CPU.
# KALMANNORM_COMMIT names the commit of a copy without git history. Wheels in .whl are installed first.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for the results}" "${PYTHON:=python3}" "${RUNS:=runs/gpu}" "${SCALE:=1}" "${ONLY:=*}"
: "${GROW:=}"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT" "$RUNS"
if [ -d .whl ]; then "$PYTHON" -m pip install -q --no-deps .whl/*.whl; fi
part=${1:?tests, overhead, throughput, speed or study}
shift

case $part in
tests)
    timeout -k 5 240 "$PYTHON" -m pytest -o addopts="" -q -n 8 -k "not interpreted and not compiles" \
        tests/test_cuda.py tests/kernels/test_on_gpu.py 2>&1 | tee "$OUT/tests.log" | tail -40
    ;;
overhead)
    timeout -k 5 240 "$PYTHON" -m benchmarks.overhead --device cuda --seconds 5 --output "$OUT/overhead.csv"
    ;;
throughput)
    timeout -k 5 240 "$PYTHON" -m benchmarks.throughput 2>&1 | tee "$OUT/throughput.txt"
    ;;
speed)
    seconds=$1
    shift
    [ -e "$RUNS/cuda.csv" ] && cp "$RUNS/cuda.csv" "$OUT"
    timeout -k 5 "$seconds" "$PYTHON" -m benchmarks --device cuda --seconds 5 --resume --output "$OUT/cuda.csv" --only "$@"
    ;;
study)
    name=$1 seconds=$2 workers=$3
    export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps
    mkdir -p /tmp/mps
    if [ -n "$GROW" ] && [ ! -e "$RUNS/$name" ]; then
        mkdir -p "$RUNS/$name"
        cp "docs/results/studies/$name/"*.csv "$RUNS/$name"
    fi
    nvidia-cuda-mps-control -d 2>/dev/null && served=yes || served=
    # After an interrupt it stops at once, with a checkpoint of each run.
    timeout -s INT -k 20 "$seconds" "$PYTHON" -m kalmannorm.lab.cli run "$name" --workers "$workers" --scale "$SCALE" \
        --only "$ONLY" --output "$RUNS" ${GROW:+--grow} >"$OUT/study.log" 2>&1
    echo "the study: $?"
    [ -n "$served" ] && echo quit | timeout 20 nvidia-cuda-mps-control
    tar czf "$OUT/runs.tgz" -C "$RUNS" --exclude='*.ckpt*' .
    find "$RUNS" -name last.ckpt | while read -r each; do
        [ -e "$(dirname "$each")/result.json" ] || echo "${each#"$RUNS"/}"
    done | tar czf - -C "$RUNS" -T - | split -b 15m - "$OUT/checkpoints.tgz."
    tail -n 40 "$OUT/study.log"
    ;;
*)
    echo "no part $part: tests, overhead, throughput, speed or study" >&2
    exit 2
    ;;
esac
