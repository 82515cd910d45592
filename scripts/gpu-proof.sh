#!/bin/sh
# What Griffin does on this machine's GPU, in at most eight minutes: the tests marked gpu, then one table.
# See gpu_proof.py for the options; PYTHON=... chooses the interpreter.
set -e
cd "$(dirname "$0")/.."
if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
if ! "$PYTHON" -c 'import griffin_offload.cli.main' 2>/dev/null; then # not installed: its two folders as one package
    rm -rf build/proof && mkdir -p build/proof && cp -r griffin_offload build/proof/ && cp -r cli build/proof/griffin_offload/cli
    PYTHONPATH="$PWD/build/proof${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH
fi
exec "$PYTHON" scripts/gpu_proof.py "$@"
