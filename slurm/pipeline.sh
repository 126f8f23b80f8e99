#!/usr/bin/env bash
# From text to a fine-tuned model in four jobs; each starts when the one before it has succeeded.
#
#   TEXT='text/*.txt' VOCAB=vocab.txt CONFIG=run.yaml TASK=tnews DATA=clue \
#       slurm/pipeline.sh --nodes=2 --gpus-per-node=8 --ntasks-per-node=8
#
# TEXT, VOCAB       input of `clue-ds shard`
# CONFIG            the run's YAML; its data.corpus and run_dir are set to CORPUS and RUN
# TASK, DATA        of `clue-ds finetune`; without TASK the pipeline ends with the exported model
# CORPUS            where the corpus goes, default: corpus
# RUN               the run directory, default: run; the exported model is RUN/export/hf
# OUTPUT            where fine-tuning writes, default: RUN/finetune
# SHARD_OPTIONS, EXPORT_OPTIONS, FINETUNE_OPTIONS
#                   more for the sbatch of these jobs, e.g. SHARD_OPTIONS="--cpus-per-task=64"
# The same command again does what is left: a finished corpus is kept, and a run continues.
# The arguments go to the sbatch of pretrain: nodes, GPUs, time. For all four jobs at once Slurm itself reads
# SBATCH_PARTITION and SBATCH_ACCOUNT.
set -Eeuo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${TEXT:?give the text, like TEXT=text/*.txt}" "${VOCAB:?give the vocabulary}" "${CONFIG:?give the YAML of the run}"
CORPUS=${CORPUS:-corpus} RUN=${RUN:-run}
if [ -n "${TASK:-}" ]; then : "${DATA:?give the directory of the data of TASK, or hub}"; fi

# Numbers of the jobs so far. If Slurm refuses one, those before it are taken back.
jobs=
trap '[ -z "$jobs" ] || scancel $jobs' ERR

# submit NAME SBATCH_ARGUMENTS...: hand in a job that starts when the one before has ended well, and is cancelled
# when that has failed. --parsable prints its number, and after a semicolon the cluster's name where it has one.
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
