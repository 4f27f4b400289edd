#!/bin/sh
# Load a running server with requests of several rates, drawn for each request.
#
#     tocom-serve &
#     sh examples/load/oha.sh
#
# -z: how long; -q: requests a second; -c: connections. oha counts latency from when a request should
# have been sent, so that waiting for a slow server counts.
cd "$(dirname "$0")/../.." || exit
exec oha -z 30s -q 20 -c 64 --latency-correction --no-tui \
    -m POST -T image/jpeg -D tocom/bundled/samples/cup.jpg \
    --rand-regex-url "${SERVER:-http://127.0.0.1:8000}/v1/classify\?rate=(0|2|4|auto)&top_k=1"
