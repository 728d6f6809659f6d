#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job in one command: a tokenizer, a corpus and a small BERT from English text, trained on two processes with
# tensor parallelism, evaluated, and asked to fill in masked words.
#
#   bash launch/quickstart.sh [--text FILE...] [--steps N] [--out DIR] [section.key=value...]
#
#   --text FILE...   your own text instead of the documentation that Python ships: JSON lines with a "text" field, or
#                    plain text with blank lines between documents; .gz and .zst too
#   --steps N        optimizer steps (default: those of configs/bert_tiny.yaml)
#   --out DIR        where everything goes (default runs/quickstart); the same directory again goes on where it stopped
#   section.key=value...   further settings of the run, behind an option, as in: --steps 5000 model.hidden_size=256
set -euo pipefail
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'quickstart: %s\n' "$*" >&2; exit 2; }
say() { printf '\n== %s\n' "$*"; }
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$started_in" "$1" ;; esac; }

texts=() settings=() steps="" out=$PWD/runs/quickstart
while [ $# -gt 0 ]; do
    case $1 in
        --text)
            shift
            while [ $# -gt 0 ] && [[ $1 != --* ]]; do
                texts+=("$(absolute "$1")")
                shift
            done
            [ ${#texts[@]} -gt 0 ] || fail "--text needs at least one file"
            ;;
        --steps)
            [[ ${2-} =~ ^[1-9][0-9]*$ ]] || fail "--steps is '${2-}': give a number of steps, 1 or more"
            steps=$2
            shift 2
            ;;
        --out)
            [ -n "${2-}" ] || fail "--out needs a directory"
            out=$(absolute "$2")
            shift 2
            ;;
        -h | --help)
            sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p;}' launch/quickstart.sh
            exit 0
            ;;
        [a-z]*.[a-z]*=*) settings+=("$1") && shift ;;
        *) fail "unknown argument $1: see launch/quickstart.sh --help" ;;
    esac
done
for file in ${texts[@]+"${texts[@]}"}; do
    [ -r "$file" ] && [ -f "$file" ] || fail "--text $file is not a file that can be read"
done

bash launch/setup.sh
python=.venv/bin/python
began=$SECONDS

# One directory holds one text's tokenizer, corpus and model.
mkdir -p "$out"
input=$(printf '%s\n' ${texts[@]+"${texts[@]}"})
if [ -f "$out/input" ] && [ "$(cat "$out/input")" != "$input" ]; then
    fail "$out was made from other text: give --out another directory"
fi
printf '%s\n' "$input" >"$out/input"

if [ ${#texts[@]} -eq 0 ]; then
    texts=("$out/text/python.txt")
    if [ ! -f "${texts[0]}" ]; then
        say "Collecting English text from the Python installation"
        $python tools/collect_python_text.py "${texts[0]}"
    fi
    questions=(
        "the function returns the [MASK] of the array."
        "if the file does not [MASK], an error is raised."
        "this method is used to [MASK] the values of the tensor."
    )
else
    questions=("he looked at the [MASK] of the house." "it is one of the most [MASK] things in the world.")
fi

tokenizer=$out/tokenizer
if [ ! -f "$tokenizer/vocab.txt" ]; then
    say "Training a tokenizer"
    # Short texts do not hold enough different words for so large a vocabulary.
    $python -m megatron_bert train-tokenizer --input "${texts[@]}" --type wordpiece --vocab-size 8192 --at-most \
        --output "$tokenizer"
    printf '%s: %s entries\n' "$tokenizer/vocab.txt" "$(wc -l <"$tokenizer/vocab.txt")"
fi

corpus=$out/corpus
if [ ! -f "${corpus}_text_sentence.idx" ]; then
    say "Turning the text into a corpus"
    $python -m megatron_bert preprocess --input "${texts[@]}" --tokenizer "$tokenizer" --output-prefix "$corpus"
fi

say "Pretraining on two processes, tensor parallel"
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
threads=$((cores / 2 > 8 ? 8 : cores > 1 ? cores / 2 : 1)) # more than 8 do not help a model this small
# The warm-up has the share of the steps that it has in the settings file.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} $python -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m megatron_bert pretrain configs/bert_tiny.yaml \
    tokenizer.path="$tokenizer" data.train="${corpus}_text_sentence" parallel.tensor=2 training.device=cpu \
    training.micro_batch_size=48 training.run_dir="$out/run" \
    ${steps:+training.steps=$steps learning_rate.warmup_steps=$((steps / 20))} \
    ${settings[@]+"${settings[@]}"}

say "Filling in masked words"
$python -m megatron_bert fill-mask "$out/run" --top 3 "${questions[@]}"

say "Done in $((SECONDS - began)) seconds; everything is in $out"
$python tools/draw_curves.py "$out/run"
cat <<END
metrics, one line a logged step: $out/run/metrics.jsonl
checkpoints:                     $out/run/checkpoints
ask it yourself:                 .venv/bin/megatron-bert fill-mask $out/run "your text with a [MASK] in it."
END
