#!/usr/bin/env bash
# From text to a fine-tuned model in four jobs; each starts after the one before it has succeeded.
#
#   TEXT='text/*.txt' VOCAB=vocab.txt CONFIG=run.yaml TASK=tnews DATA=clue \
#       slurm/pipeline.sh --nodes=2 --gpus-per-node=8 --ntasks-per-node=8
#
# TEXT, VOCAB       input of `clue-ds shard`
# CONFIG            the run's YAML; its data.corpus and run_dir are set to CORPUS and RUN
# TASK, DATA        of `clue-ds finetune`; without TASK the pipeline ends with the exported model
# CORPUS            directory for the corpus, default: corpus
# RUN               the run directory, default: run; the exported model is RUN/export/hf
# OUTPUT            directory for fine-tuning, default: RUN/finetune
# SHARD_OPTIONS, EXPORT_OPTIONS, FINETUNE_OPTIONS
#                   more sbatch options for these jobs, e.g. SHARD_OPTIONS="--cpus-per-task=64"
# Running the same command again does the remaining work: a finished corpus is kept, and a run continues.
# The arguments go to the sbatch of pretrain: nodes, GPUs, time. Slurm itself reads SBATCH_PARTITION and
# SBATCH_ACCOUNT, which apply to all four jobs.
set -Eeuo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${TEXT:?give the text, like TEXT=text/*.txt}" "${VOCAB:?give the vocabulary}" "${CONFIG:?give the YAML of the run}"
CORPUS=${CORPUS:-corpus} RUN=${RUN:-run}
if [ -n "${TASK:-}" ]; then : "${DATA:?give the directory of the data of TASK, or hub}"; fi

# Numbers of the jobs submitted so far. If Slurm refuses one, those before it are cancelled.
jobs=
trap '[ -z "$jobs" ] || scancel $jobs' ERR

# submit NAME SBATCH_ARGUMENTS...: submit a job that starts when the one before has succeeded, and is cancelled when
# that has failed. --parsable prints its number, followed by a semicolon and the cluster's name if there is one.
submit() {
    local condition= job
    [ -z "$jobs" ] || condition="--dependency=afterok:${jobs##* } --kill-on-invalid-dep=yes"
    job=$(sbatch --parsable $condition "${@:2}" | cut -d';' -f1)
    jobs="$jobs $job"
    echo "$1 $job"
}

# corpus.json is written last. An unfinished corpus is resumed.
[ -e "$CORPUS/corpus.json" ] || submit shard ${SHARD_OPTIONS:-} "$here/shard.sbatch" "$TEXT" --vocab "$VOCAB" --output "$CORPUS"
submit pretrain "$@" "$here/pretrain.sbatch" --config "$CONFIG" --data.corpus "$CORPUS" --run_dir "$RUN"
submit export ${EXPORT_OPTIONS:-} "$here/export.sbatch" "$RUN" --to hf --force
if [ -n "${TASK:-}" ]; then
    submit finetune ${FINETUNE_OPTIONS:-} "$here/finetune.sbatch" \
        --task "$TASK" --model "$RUN/export/hf" --data "$DATA" --output "${OUTPUT:-$RUN/finetune}"
fi
echo "watch them with: squeue --me"
