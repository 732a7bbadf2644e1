#!/usr/bin/env bash
# scripts/launch.sh N [overrides of train.py]: train with N workers on this machine, each on its part of the cores.
# Prints the output of worker 0. On Ctrl-C, SIGTERM and SIGHUP the workers save and end, on SIGUSR1 they save and go on;
# exit statuses are those of train.py.
# docs/distributed.md describes how to use several machines.
set -u -m # with job control, Ctrl-C is sent to this script only, which forwards it

if [[ ! ${1-} =~ ^[1-9][0-9]*$ ]]; then
    echo "error: expected the number of workers and overrides of train.py: scripts/launch.sh 2 experiment=quickstart, got: $*" >&2
    exit 2
fi
workers=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v msrun >/dev/null || PATH=$root/.venv/bin:$PATH # made by make; used unless an environment is active
if ! command -v msrun >/dev/null; then
    echo "error: expected msrun, which comes with MindSpore, in PATH: run make .venv/installed in $root" >&2
    exit 2
fi
export GLOG_v=${GLOG_v:-3}
port=${MS_SCHED_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
logs=$(mktemp -d)

touch "$logs/worker_0.log"
tail -n +1 -f "$logs/worker_0.log" | grep --line-buffered -v '^\[INFO\] DISTRIBUTED' & # MindSpore's messages at exit
# --tail_worker_log=N names no worker, so that msrun prints no output of workers.
msrun --worker_num="$workers" --local_worker_num="$workers" --master_port="$port" --log_dir="$logs" --join=True \
    --bind_core=True --tail_worker_log="$workers" "$root/train.py" parallel=data "$@" >"$logs/msrun.log" 2>&1 &
msrun=$!

forward() {
    pkill "-$1" -P "$msrun"
}
for signal in INT TERM HUP USR1; do # under nohup, HUP stays ignored
    trap "forward $signal" "$signal"
done

# When a worker fails, msrun ends all workers, but then waits half a minute for its scheduler.
failure='Worker process ([0-9]+) exit with exception. Error code: (-?[0-9]+)'
{
    while kill -0 "$msrun"; do
        if [[ $(cat "$logs/msrun.log") =~ $failure ]]; then
            sleep 2
            kill -KILL -- "-$msrun"
        fi
        sleep 0.5
    done
    wait "$msrun"
    status=$?
    kill %1
    wait %1
} 2>/dev/null # where the shell reports killed jobs

if [[ $(cat "$logs/msrun.log") =~ $failure ]]; then
    process=${BASH_REMATCH[1]} code=${BASH_REMATCH[2]}
    # The first line of a worker's log names its process; after a usage error there is no such line.
    log=$(grep -l -E "^worker [0-9]+ of [0-9]+: process $process\$" "$logs"/worker_*.log || ls "$logs"/worker_0.log)
    rank=${log##*worker_} rank=${rank%.log}
    if ((code < 0)); then
        run=$(sed -nE 's/^.*; writing to (.+)$/\1/p' "$logs/worker_0.log")
        [[ -e $run/checkpoints/last ]] && next="to continue from the last checkpoint, use the same command with run_dir=$run"
        echo "error: worker $rank was killed by signal $((-code)), so all workers were ended; ${next:+$next; }logs: $logs" >&2
        exit 1
    fi
    ((rank == 0)) || sed "s/^error:/error: worker $rank:/" "$log" | grep '^error:' >&2
    ((code == 129 || code == 130 || code == 143 || code == 2)) || echo "logs: $logs" >&2
    exit "$code"
fi
if ((status)); then
    cat "$logs/msrun.log" >&2
    exit 1
fi
rm -rf "$logs"
