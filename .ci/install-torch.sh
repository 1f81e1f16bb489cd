#!/bin/sh
# Installs PyTorch's build for the CPU: 0.2 GB to download, where the build for CUDA that pip takes on Linux is 3 GB and holds more
# memory once it is imported.
#
#     sh .ci/install-torch.sh PYTHON [INDEX]
#
# Does nothing where PyTorch is there already, where pip is told where packages come from, by a variable or in a file, and where
# the index does not answer within seconds: tightfit's own installation brings what pip takes then.
set -eu
python=$1
index=${2:-https://download.pytorch.org/whl/cpu}
requirement=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$(dirname "$0")/lock.txt")

pip() {
    "$python" -m pip --disable-pip-version-check "$@"
}

if "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    exit
fi
if pip config list | grep -E '\.(index-url|extra-index-url|find-links|no-index|constraint)=' > /dev/null; then
    echo "PyTorch: the build that pip's configuration leads to"
elif ! timeout 15 "$python" -m pip index versions torch --index-url "$index" --timeout 3 --retries 0 > /dev/null 2>&1; then
    echo "PyTorch: the build that pip takes by itself, as $index does not answer"
elif ! pip install --quiet --index-url "$index" "$requirement"; then
    echo "PyTorch: the build that pip takes by itself, as none could be installed from $index"
else
    echo "PyTorch: the build for the CPU, from $index"
fi
