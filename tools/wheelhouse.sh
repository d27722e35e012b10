#!/usr/bin/env bash
# Collects everything for a machine without network: wheels of this project and of all it needs, and their installer.
#
#   tools/wheelhouse.sh PYTHON CUDA|cpu DIR [EXTRA,EXTRA...]      for example python3.11 cu130 /mnt/usb/wheelhouse hf,plot
#
# On the other machine, which has the same PYTHON and processor, and a glibc that is not older: DIR/install.sh VENV.
# CUDA is a folder of https://download.pytorch.org/whl; TORCH_INDEX names a mirror of that folder, or is empty: no more
# than what pip is configured for. DIR is complete or not there; what a killed run has fetched, the next one goes on with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[[ $# == 3 || $# == 4 ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
python=$1 cuda=$2 dir=$3 extras=${4:-data,sentencepiece,hf,plot,watch,log,remote}
[[ $cuda =~ ^(cpu|cu[0-9]+)$ ]] || { echo "CUDA=$cuda: name cpu, or a version as cu130" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    { echo "PYTHON=$python: is no Python 3.11, 3.12 or 3.13 that runs here" >&2; exit 2; }
[[ ! -e $dir ]] || { echo "$dir: is there already; name another DIR, or remove it" >&2; exit 2; }

index=${TORCH_INDEX-https://download.pytorch.org/whl/$cuda}
work=$dir.partial
mkdir -p "$work"
exec {lock}>"$work/lock"
flock --nonblock "$lock" || { echo "$work: another process is at work there; wait for it, or end it" >&2; exit 2; }
sed -E "s/^(torch==[0-9.]+)/\1${index:++$cuda}/" scripts/constraints.txt >"$work/constraints.txt"
[[ -x $work/venv/bin/python ]] || "$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check)
mkdir -p "$work/source" # what is built leaves its traces there, not here
tar -c megatron_sep configs scripts tools setup.py pyproject.toml MANIFEST.in CHANGELOG.md README.md LICENSE | tar -x -C "$work/source"
"${pip[@]}" wheel --quiet --wheel-dir "$work/wheels" -c "$work/constraints.txt" ${index:+--extra-index-url "$index"} \
    pip setuptools wheel "$work/source[$extras]"

cat >"$work/install.sh" <<EOT
#!/usr/bin/env bash
# Installs megatron_sep[$extras] into a virtual environment, from what lies beside this file: ./install.sh VENV
set -euo pipefail
here=\$(cd "\$(dirname "\${BASH_SOURCE[0]}")" && pwd)
python=\${PYTHON:-$(basename "$python")} venv=\${1:?usage: install.sh VENV}
(cd "\$here" && sha256sum --check --quiet SHA256SUMS)
[[ "\$("\$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" == $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ]] ||
    { echo "\$python: these wheels are of $("$python" -V); PYTHON=/path/to/python \$0 VENV" >&2; exit 2; }
"\$python" -m venv "\$venv"
"\$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "\$here/wheels" \\
    -c "\$here/constraints.txt" "megatron_sep[$extras]"
echo "installed: \$venv/bin/megatron_sep"
EOT
chmod +x "$work/install.sh"
rm -rf "$work/venv" "$work/source" "$work/lock"
(cd "$work" && find wheels constraints.txt install.sh -type f -print0 | sort -z | xargs -0 sha256sum >SHA256SUMS)
mv "$work" "$dir"
echo "$dir: $(find "$dir/wheels" -name '*.whl' | wc -l) wheels, $(du -sh "$dir" | cut -f1); there: $dir/install.sh VENV"
