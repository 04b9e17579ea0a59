#!/usr/bin/env bash
# Makes an environment of the benchmarks. usage: benchmarks/setup_env.sh FOLDER [deploy|qat|accuracy]
# FOLDER becomes a virtual environment with a CPU build of PyTorch and the peers; `import qdq` works in it.
# deploy (default): the peers and data of deploy.py. Fashion-MNIST (Debian package dataset-fashion-mnist, MIT) goes to
# $QDQ_DATA, by default ~/.cache/qdq-data. qat: the peers of qat.py; kernels.py runs in it as well. accuracy: both, and
# the reviews of encoder_scores.py.
set -euo pipefail
usage() { echo "usage: $0 FOLDER [deploy|qat|accuracy]" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] || usage
here=$(cd "$(dirname "$0")" && pwd)
env=$1
kind=${2:-deploy}
case $kind in deploy | qat | accuracy) ;; *) usage ;; esac
data=${QDQ_DATA:-$HOME/.cache/qdq-data}

[ -x "$env/bin/python" ] || python3 -m venv "$env"
pip=("$env/bin/python" -m pip install --quiet -c "$here/constraints.txt")
"${pip[@]}" torch==2.13.0
if [ "$kind" != qat ]; then
    "${pip[@]}" -r "$here/peers.txt"
    "${pip[@]}" --no-deps -r "$here/peers-nodeps.txt"
else
    "${pip[@]}" --no-deps "$(grep '^torchvision==' "$here/peers-nodeps.txt")"
fi
if [ "$kind" != deploy ]; then "${pip[@]}" -r "$here/peers-qat.txt"; fi
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
(cd "$here/../src" && pwd) > "$site/qdq-source.pth"

fashion=$data/deb/usr/share/datasets/fashion-mnist
if [ "$kind" != qat ] && [ ! -d "$fashion" ] && [ ! -d /usr/share/datasets/fashion-mnist ]; then
    mkdir -p "$data/deb"
    (cd "$data" && apt-get download --quiet dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb deb) ||
        echo "Fashion-MNIST was not fetched (run 'apt-get update' first): S1 then uses its committed subset, P1 is skipped" >&2
fi
reviews=vaderSentiment-3.3.2.tar.gz
if [ "$kind" = accuracy ] && [ ! -f "$data/$reviews" ]; then
    mkdir -p "$data"
    "$env/bin/python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation -d "$data" vadersentiment==3.3.2 ||
        echo "the reviews were not fetched: encoder_scores.py then leaves out sentiment" >&2
fi
"$env/bin/python" -c 'import torch; print("environment ready, torch", torch.__version__)'
