#!/usr/bin/env bash
# From nothing to a trained small SepLLM model: set-up, corpus, training, sample, picture. Run again, it goes on or says it is done.
#
#   ./scripts/quickstart.sh [section.key=value ...]      for example train.steps=400
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh plot,hf

run=runs/quickstart
config=configs/runs/quickstart.yaml

echo "== corpus and tokenizer"
python -m megatron_sep.prepare.quickstart $run
echo "== model"
python -m megatron_sep show $config "$@" | grep '^#'
echo "== training"
python -m megatron_sep train $config "$@"
echo "== sample"
prompt=$'class SepLLMConfig(PreTrainedConfig):\n    r"""\n    hidden_size'
python -m megatron_sep generate $run --prompt "$prompt" --temperature 0.5 --max-tokens 160 | tee $run/sample.txt
python -m megatron_sep plot $run --out $run/loss.png

cat <<EOT

made:
  $run/checkpoints/   weights, optimizer and position in the data, complete and verified
  $run/metrics.jsonl  every number of the run
  $run/loss.png       training and validation loss
  $run/sample.txt     the text above
next:
  source .venv/bin/activate
  python -m megatron_sep generate $run --prompt "class "
  python -m megatron_sep train $config train.steps=600                     # go on
  torchrun --nproc-per-node 2 -m megatron_sep train $config dir=runs/two   # the same on two processes
EOT
