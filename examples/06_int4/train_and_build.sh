#!/bin/sh
# An adapter that is trained on the very weights that it is served with: int4 then costs it nothing.
#
#     examples/06_int4/train_and_build.sh models/smollm2 out-int4 [options of train.py]
#
# 1. the base with each weight on a step of its int4 scale, as a plain fp32 checkpoint
# 2. an FFBA adapter, trained on that as on any other model (the first example's script, 20 minutes on two cores)
# 3. an int4 artifact, which finds the same codes and scales again; it fails where its answers have moved
set -eu
base=$1 out=$2
shift 2
here=$(dirname "$0")
bin=${BIN:+$BIN/}

mkdir -p "$out"
"${bin}flora-export" quantize-base "$base" --precision int4 --output "$out/base"
"${bin}python" "$here/../01_train_ffba/train.py" --base "$out/base" --output "$out/adapter" "$@"
"${bin}flora-export" build "$out/adapter" --base "$out/base" --backend onnxruntime --precision int4 \
  --max-quantization-loss 0.02 --output "$out/artifact"
