#!/usr/bin/env bash
# What a machine with a CUDA GPU has to show, in calls of ten minutes: each does what fits, and the next goes on where it stopped.
#
#     benchmarks/on_gpu.sh RESULTS [SECONDS]     # 570 seconds, unless told; again, while it exits with 75
#     benchmarks/on_gpu.sh --missing             # packages to stage as wheels (missing.py): no network is needed then
#
# PARTS chooses among: latency (gpu.py, one file for each of DTYPES), artifacts (built for CUDA and verified there), accuracy and
# frontier (of PRESET, full); all but the first need models/smollm2, which is made if it is not there. What accuracy and frontier keep is
# in RESULTS/runs.tar.gz as well: with that file alone, another machine of the same kind goes on.
# Exit codes: 0 all is in RESULTS, 75 call again, 1 a parity check or a verification failed, 2 wrong use, 3 a part could not run, and why.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TQDM_DISABLE=1
base=models/smollm2
adapter=examples/01_train_ffba/adapter

[[ ${1:-} == --missing ]] && { $python benchmarks/missing.py; exit; }
[[ $# -ge 1 && $# -le 2 ]] || { sed -n '2,10s/^# \?//p' "$0" >&2; exit 2; }
mkdir -p "$1"
results=$(cd "$1" && pwd)
end=$((SECONDS + ${2:-570}))
parts=" ${PARTS:-latency artifacts accuracy frontier} "
failed=0

# need SECONDS: end this call where so many are not left
need() {
	((end - SECONDS >= $1)) || { echo "$((end - SECONDS)) s are left: call again" >&2; exit 75; }
}

# cannot PART WHY: go on with the others
cannot() {
	echo "$1: $2" >&2
	((failed == 1)) || failed=3
}

# ready PART PACKAGES: whether a part is asked for, none of its packages is missing, and its base is there
ready() {
	[[ $parts == *" $1 "* ]] || return
	[[ -z $2 ]] || { cannot "$1" "$(echo $2) missing"; return 1; }
	[[ -d $base ]] || $python examples/00_get_smollm2.py $base >&2 || { cannot "$1" "$base is not there"; return 1; }
}

if [[ -f $results/runs.tar.gz && ! -d $results/accuracy && ! -d $results/frontier ]]; then
	tar -C "$results" -xzf "$results/runs.tar.gz" || { rm -rf "$results/accuracy" "$results/frontier"; exit 3; }
fi
pack() {
	local kept=$(cd "$results" && ls -d accuracy frontier 2>/dev/null)
	[[ -n $kept ]] && tar -C "$results" --exclude=adapters -czf "$results/runs.part" $kept && mv "$results/runs.part" "$results/runs.tar.gz"
}
trap pack EXIT
missing=$($python benchmarks/missing.py) && missing_on_cpu=$($python benchmarks/missing.py --cpu) || exit 3

[[ $parts == *" latency "* ]] && for dtype in ${DTYPES:-bf16 fp16}; do
	file=$results/gpu-$dtype.json
	if ! grep -qs '"complete": true' "$file"; then
		need "${LEAST:-240}"
		[[ -s $file ]] && mv "$file" "${file%.json}-unfinished.json"
		$python benchmarks/gpu.py --dtypes "$dtype" --seconds $((end - SECONDS - 30)) --output "$file" ${GPU_ARGS:-}
		grep -qs '"complete": true' "$file" || cannot latency "gpu.py ended before $file was complete"
	fi
	grep -qs '"passed": false' "$file" && failed=1
done

ready artifacts "$missing" && for precision in fp16 bf16 int4; do
	file=$results/cuda-$precision.json
	if [[ ! -s $file ]]; then
		need 120
		out=$(mktemp -d)
		timeout $((end - SECONDS)) $python -m flora_export.cli build $adapter --base $base --backend onnxruntime --target cuda \
			--precision $precision --output "$out/out" --json >"$file.part"
		code=$?
		rm -rf "$out"
		((code == 124)) && exit 75
		((code > 1)) && { cannot artifacts "the build in $precision ended with $code"; continue; }
		mv "$file.part" "$file"
	fi
	grep -q '"verified": true' "$file" || failed=1
done

compare() { # PART MODULE
	local file=$results/$1-${PRESET:=full}.json
	if [[ ! -s $file ]] && ready "$1" "$missing_on_cpu"; then
		need 60
		timeout $((end - SECONDS)) $python -m "$2" --base $base --preset "$PRESET" --work "$results/$1" --output "$results"
		local code=$?
		((code == 124)) && exit 75
		((code == 0)) || cannot "$1" "$2 ended with $code"
	fi
}
compare accuracy benchmarks.accuracy
compare frontier benchmarks.accuracy.frontier
exit $failed
