#!/usr/bin/env bash
# From text to an exported model in three jobs; each starts when the one before it has succeeded.
#
#   TEXT='text/*.txt' VOCAB=vocab.txt CONFIG=run.yaml slurm/pipeline.sh --nodes=2 --ntasks-per-node=8
#
# TEXT, VOCAB   input of `clue-ds shard`; the corpus is written to CORPUS
# CORPUS        default: corpus                    RUN     run directory, default: run
# CONFIG        the run's YAML; its data.corpus and run_dir are set to CORPUS and RUN
# SHARD_OPTIONS more for the sbatch of shard, e.g. SHARD_OPTIONS="--cpus-per-task=64"
# The arguments go to the sbatch of pretrain: nodes, GPUs, partition, account.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${TEXT:?give the text, e.g. TEXT='text/*.txt'}" "${VOCAB:?give the vocabulary}" "${CONFIG:?give the run\'s YAML}"
CORPUS=${CORPUS:-corpus} RUN=${RUN:-run}

# --parsable prints the number of the job, and the cluster's name after a semicolon where it has one.
shard=$(sbatch --parsable ${SHARD_OPTIONS:-} "$here/shard.sbatch" "$TEXT" --vocab "$VOCAB" --output "$CORPUS")
pretrain=$(sbatch --parsable --dependency="afterok:${shard%%;*}" --kill-on-invalid-dep=yes "$@" \
    "$here/pretrain.sbatch" --config "$CONFIG" --data.corpus "$CORPUS" --run_dir "$RUN")
export=$(sbatch --parsable --dependency="afterok:${pretrain%%;*}" --kill-on-invalid-dep=yes \
    "$here/export.sbatch" "$RUN" --to hf)
echo "shard ${shard%%;*} -> pretrain ${pretrain%%;*} -> export ${export%%;*}; watch them with: squeue --me"
