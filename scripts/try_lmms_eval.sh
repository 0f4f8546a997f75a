#!/bin/sh
# Drives a model folder from the real lmms-eval: lists the model, runs local tasks (tests/harness) in both forms of
# requests, and runs the adapter's tests against lmms-eval's own classes. The environment is one of its own, made once,
# because lmms-eval pins older releases of packages that this one uses as well. The tasks fetch nothing.
#   scripts/try_lmms_eval.sh [MODEL_FOLDER [ENVIRONMENT]]       results: runs/lmms_eval
# Another interpreter: PYTHON=python3.12 scripts/try_lmms_eval.sh
set -eu
cd "$(dirname "$0")/.."
OUT=runs/lmms_eval
MODEL=${1:-open_pisces/weights/tiny}
ENVIRONMENT=${2:-$OUT/environment}
BIN=$ENVIRONMENT/bin

if [ ! -e "$ENVIRONMENT/ready" ]; then
    echo "making $ENVIRONMENT (minutes, once)"
    "${PYTHON:-python3}" -m venv "$ENVIRONMENT"
    INSTALL="$BIN/python -m pip install --disable-pip-version-check --quiet --constraint tests/harness/constraints.txt"
    $INSTALL torch setuptools # first, so that nothing replaces torch by a larger build
    $INSTALL --no-build-isolation --editable '.[lmms-eval]' pytest pytest-timeout
    touch "$ENVIRONMENT/ready"
fi

mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME="$PWD/$OUT/cache"
BEFORE="import sys; sys.path.insert(0, 'tests/harness'); import run_lmms_eval
kept = run_lmms_eval.declare_missing_operators()"

evaluate() { # tasks, further arguments; lmms-eval ends with 0 after an error as well, so its words are read
    tasks=$1
    shift
    "$BIN/python" tests/harness/run_lmms_eval.py --model pisces --model_args "pretrained=$MODEL" \
        --include_path tests/harness --tasks "$tasks" --batch_size 8 --output_path "$OUT" --log_samples \
        --verbosity WARNING "$@" > "$OUT/last.log" 2>&1 || { cat "$OUT/last.log"; exit 1; }
    cat "$OUT/last.log"
    ! grep -q "Error during evaluation" "$OUT/last.log" || exit 1
}

"$BIN/python" -c "$BEFORE
from lmms_eval.models import get_model, get_model_manifest, list_available_models
names = list_available_models(include_aliases=True)
print(len(names), 'models, among them', [name for name in names if 'pisces' in name])
print(get_model_manifest('pisces'), get_model('pisces'), get_model('pisces', force_simple=True), sep='\n')"
evaluate pisces_questions,pisces_messages,pisces_rounds
evaluate pisces_questions,pisces_choices,pisces_rounds --force_simple
"$BIN/python" -c "$BEFORE
import pytest
sys.exit(pytest.main(['-q', 'tests/integrations/test_integrations.py']))"
