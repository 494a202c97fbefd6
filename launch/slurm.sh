#!/bin/bash
# VATT mbs on eight hosts of eight GPUs, one process a host.
#
#     sbatch launch/slurm.sh                                     # configs/vatt.py:mbs into runs/mbs
#     sbatch launch/slurm.sh configs/vatt.py:bbs runs/bbs --config.batch_size=4096
#
# The same command continues a run that a time limit or a preemption ended: SLURM sends SIGTERM two minutes before (--signal), the step under way
# is saved on all hosts, and --requeue starts the job again.
#SBATCH --job-name=vatt
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vatt-%j.log
set -euo pipefail

config=${1:-configs/vatt.py:mbs}
workdir=${2:-runs/mbs}
shift $(($# < 2 ? $# : 2))

cd "${SLURM_SUBMIT_DIR:-.}"
# One task a host: it takes all GPUs of the host. run.py reads its place from SLURM's variables (vatt_jax/parallel/distributed.py).
srun --kill-on-bad-exit=1 .venv/bin/python run.py --config="$config" --workdir="$workdir" --machine=gpu_64 --quiet "$@"
