#!/bin/bash
# One run on several nodes, 8 GPUs each: sbatch configs/slurm.sh configs/moshi_full.py --out=out/moshi_full
# The repository, its .venv and --out lie on a file system that all nodes see. Started again, it continues.
#SBATCH --job-name=multistream
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --output=%x_%j.log

# Without SLURM, the same on every node: torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=1 \
#   --rdzv_endpoint=FIRST_NODE:29500 train.py configs/NAME.py
# On one node: torchrun --standalone --nproc_per_node=8 train.py configs/NAME.py
# A large corpus first, by 64 jobs at once, then the index over what they encoded (a job that died leaves its part to it):
#   jobs=$(sbatch --parsable --array=0-63 --wrap='.venv/bin/python data.py prepare configs/NAME.py --shard=$SLURM_ARRAY_TASK_ID/64')
#   sbatch --dependency=afterany:$jobs --wrap='.venv/bin/python data.py prepare configs/NAME.py'

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"

# SIGTERM comes two minutes before the end: every rank saves, and the job that is queued again goes on from there.
trap 'kill -TERM "$step"; wait "$step"; scontrol requeue "$SLURM_JOB_ID"' TERM
srun --kill-on-bad-exit=1 .venv/bin/torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${GPUS_PER_NODE:-8}" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:29500" train.py "$@" &
step=$!
wait "$step"
