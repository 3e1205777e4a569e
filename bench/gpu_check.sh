#!/usr/bin/env bash
# One unattended visit to a machine with a GPU, in order of worth. Each step has a time limit, its result is kept as soon
# as it ends, and none that fails stops the others: the exit status is always 0, and OUT/summary.txt tells.
#
#   bench/gpu_check.sh OUT [minutes]              OUT receives summary.txt and visit.tar.gz (logs, JSON, plots, profiles)
#   DRY_RUN=1 bench/gpu_check.sh OUT [minutes]    the same steps on the CPU, with Triton's interpreter and small shapes
#
# PYTHON  the Python to use: by default .venv/bin/python where it runs, else python3
# CASES   what to measure, as `python -m bench run` takes it; a pattern for a group, with ? for a blank
# SKIP    names of steps to leave out
set -uo pipefail

out=$(mkdir -p "$1" && cd "$1" && pwd)
minutes=${2:-9}
cd "$(dirname "$0")/.."
deadline=$((SECONDS + minutes * 60))
python=${PYTHON:-.venv/bin/python}
"$python" -c "" 2>/dev/null || python=python3
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
visit=$(mktemp -d)
trap 'rm -rf "$visit"' EXIT

read -r -a groups <<<"${CASES:-lora_linear linear_4bit prompt_attention bottleneck_adapter scaled_linear codec prompt_methods smollm2_step}"
where=(--device cuda)
effort=(--shapes llama-3.1-8b --no-compiled --seconds 1.5)
tests=(tests)
cores=$(nproc)
# most of their time is Triton's compiler's
"$python" -c "import xdist" 2>/dev/null && tests+=(-n $((cores < 12 ? cores : 12)))
tuned=(--shapes square-4096 --seconds 0.5)
methods=(--model llama-3.2-1b --seconds 1)
if [ -n "${DRY_RUN:-}" ]; then
  export TRITON_INTERPRET=1 PEFT_KERNELS_BACKEND=triton
  read -r -a groups <<<"${CASES:-linear_4bit/*M=16 codec}"
  where=(--device cpu --dtype float16 --quick)
  effort=(--seconds 0.01)
  tests=(tests/test_triton_nf4.py)
  tuned=(--seconds 0.01)
  methods=(--model tiny --only BitFit --batch 1 --sequence 8 --seconds 0.01)
fi

# skip NAME REASON: a step that cannot run here.
skip() {
  printf '%-28s skipped: %s\n' "$1" "$2" | tee -a "$out/summary.txt"
}

# step NAME LIMIT COMMAND...: run for at most LIMIT seconds and no longer than the visit; keep the log.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS status=0
  shift 2
  if [[ " ${SKIP:-} " == *" $name "* ]]; then
    skip "$name" "not asked for"
    return
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 5 ]; then
    echo "$name: no time left" | tee -a "$out/summary.txt"
    return
  fi
  timeout --kill-after=10 "$limit" "$@" >"$visit/$name.log" 2>&1 || status=$?
  printf '%-28s status %3d after %3d s\n' "$name" "$status" $((SECONDS - started)) | tee -a "$out/summary.txt"
  [ "$status" -eq 0 ] || tail -n 3 "$visit/$name.log" | sed 's/^/    /' | tee -a "$out/summary.txt"
  tar -czf "$out/visit.tar.gz" -C "$visit" .
}

: >"$out/summary.txt"
step environment 60 "$python" -m peft_kernels
if command -v nvidia-smi >/dev/null; then step card 30 nvidia-smi -q; else skip card "there is no nvidia-smi"; fi
step ceilings 90 "$python" -m bench ceilings "${where[@]}" --out "$visit/ceilings.json"

# The CUDA kernels are built for this card alone, in a step of their own: their failure must not cost the core.
step build 240 env PEFT_KERNELS_BUILD=cpu "$python" setup.py --quiet build_ext --inplace --parallel "$cores"
if [ -n "${DRY_RUN:-}" ]; then
  skip build-cuda "a dry run"
elif ! command -v nvcc >/dev/null; then
  skip build-cuda "there is no nvcc"
else
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  [ "$arch" = 90 ] && arch=90a
  step build-cuda 120 env PEFT_KERNELS_BUILD=cuda PEFT_KERNELS_CUDA_ARCHS="$arch" \
    "$python" setup.py --quiet build_ext --inplace --parallel "$cores"
fi

step tests 240 "$python" -m pytest -q -m gpu -p no:cacheprovider "${tests[@]}"

set -f
for group in "${groups[@]}"; do
  step "bench-${group%%/*}" 240 "$python" -m bench run "$group" "${where[@]}" "${effort[@]}" --out "$visit/results"
done
set +f
step tune 120 "$python" -m bench tune linear_4bit "${where[@]}" "${tuned[@]}" --out "$visit/results"

profile=("$python" -m bench profile "$visit/results" "${where[@]}")
[ -n "${DRY_RUN:-}" ] || profile+=(--shapes llama-3.1-8b)
step profile 120 "${profile[@]}"
if [ -z "${DRY_RUN:-}" ]; then # a case of each size of M, against the same peer compiled
  step bench-compiled 240 "$python" -m bench run "lora_linear/*q, o*float32*" "${where[@]}" --shapes llama-3.1-8b \
    --peers compiled --seconds 1.5 --out "$visit/compiled"
fi
step methods 180 "$python" -m bench methods "${where[@]}" "${methods[@]}" --out "$visit/results"

if ! compgen -G "peft_kernels/_native_cuda*.so" >/dev/null; then
  skip sanitizer "the CUDA kernels were not built"
elif ! command -v compute-sanitizer >/dev/null; then
  skip sanitizer "there is no compute-sanitizer"
else
  for tool in memcheck racecheck; do # real shapes take it too long
    step "sanitizer-$tool" 120 compute-sanitizer --tool $tool --error-exitcode 1 \
      "$python" -m pytest -q -m gpu -k "not real and not Device" -p no:cacheprovider tests/test_native_cuda.py
  done
fi

if command -v ncu >/dev/null; then
  # the clocks stay as they are
  step ncu 180 ncu --clock-control none --set basic --launch-skip 20 --launch-count 20 "${profile[@]}" --calls 2
else
  skip ncu "there is no ncu"
fi
step report 60 "$python" -m bench report "$visit/results"
echo "visit over after $SECONDS s; results in $out" | tee -a "$out/summary.txt"
exit 0
