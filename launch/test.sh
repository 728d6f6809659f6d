#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything a change must pass: lint, format, types, tests. Arguments go to pytest.
#
#   bash launch/test.sh
#   bash launch/test.sh tests/parallel -k dropout
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

bash launch/setup.sh --test || exit $?
failed=0

check() { # run a checker, show its output only where it complains
    local output
    if output=$(.venv/bin/python -m "$@" 2>&1); then
        printf 'ok      %s\n' "$*"
    else
        printf 'FAILED  %s\n%s\n' "$*" "$output"
        return 1
    fi
}

check ruff check || failed=1
check ruff format --check || failed=1
check mypy & # beside the tests, unless they are few: pytest's closing line stays the last
types=$!
[ $# = 0 ] || wait "$types" || failed=1
workers=$(($(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2) + 1)) # one more than processors: some tests wait most of their time
workers=$((workers > 4 ? 4 : workers))
printf 'running pytest with %s workers\n' "$workers"
.venv/bin/python -m pytest -n "$workers" --dist worksteal "$@" || failed=1
[ $# != 0 ] || wait "$types" || failed=1
exit $failed
