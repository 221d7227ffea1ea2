#!/usr/bin/env bash
# Which of the seams that TAPER stands on moved in a release of vLLM, supported or not?
#
#   scripts/seams.sh 0.34.0    installs that release into .venv-0.34.0 (`make distclean` removes it)
#   scripts/seams.sh           the vLLM of .venv
#
# Looks at every name, signature and field of the contract, and at what a stock scheduler does with them; starts
# no engine. The last lines name what moved. Exit status: 0 all hold, 1 some moved, anything else: could not look.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VLLM=${1:-}
scripts/setup.sh || exit 3
export COLUMNS=200 # pytest cuts what moved off at the edge of the screen
".venv${VLLM:+-$VLLM}/bin/python" -m pytest --tb=no -rfE tests/vllm/test_contract.py tests/vllm/test_behaviour.py
