"""Command lines that people might type: right ones with a few slips, the same ones for a seed."""

from __future__ import annotations

import argparse
import random

from megatron_dmc.cli import build_parser

RIGHT = {
    "train": "train --dmc-stage zero_out --pretrained-checkpoint base --save run --train-data-path data/train "
    "--train-iters 2 --seq-length 32",
    "train off": "train --dmc-stage off --pretrained-checkpoint base --data-path data/train --train-iters 2 --lr 1e-3",
    "train alone": "train --dmc-stage off --mock-data --train-iters 2 --num-layers 2 --hidden-size 32 "
    "--num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --vocab-size 99 "
    "--tokenizer-type NullTokenizer",
    "evaluate": "evaluate --model hf --data data/test --seq-length 16 --sequences 2 --batch-size 2",
    "eval": "eval --model hf --tasks passkey --lengths 128 --depths 1",
    "generate": "generate --model hf --prompt hello --max-new-tokens 3",
    "chat": "chat --model hf --chat-template template.jinja --max-new-tokens 3",
    "data prepare": "data prepare text.jsonl --tokenizer hf --output new --workers 1",
    "data check": "data check data/train --tokenizer hf",
    "convert import": "convert import hf new --no-verify",
    "convert export": "convert export base new --no-verify",
    "convert verify": "convert verify base hf --no-logits",
    "convert inspect": "convert inspect base",
    "report": "report done --output new",
}
MEGATRON = """--tensor-model-parallel-size 2|--pipeline-model-parallel-size 3|--context-parallel-size 2
--sequence-parallel|--micro-batch-size 3|--global-batch-size 7|--micro-batch-size 0|--bf16|--fp16|--bf16 --fp16
--fp8-format hybrid|--use-distributed-optimizer|--overlap-grad-reduce|--overlap-param-gather
--recompute-granularity full|--recompute-granularity partial|--recompute-method uniform|--lr 1e-4|--lr -1|--lr fast
--min-lr 1|--lr-decay-style cosine|--lr-decay-style saw|--lr-warmup-iters 9|--lr-warmup-fraction 2
--lr-warmup-samples 5|--weight-decay -1|--clip-grad x|--train-samples 10|--train-iters 0|--train-iters many
--seq-length 4096|--seq-length 31|--max-position-embeddings 8|--num-layers 3|--hidden-size 33|--num-query-groups 3
--eval-iters 5|--eval-interval 0|--full-validation|--split 1,2|--split x|--valid-data-path nowhere
--data-path data/train|--data-path|--train-data-path 1 data/train data/test|--data-args-path text.jsonl
--per-split-data-args-path text.jsonl|--eod-mask-loss|--reset-position-ids|--null-tokenizer-eod-id 77
--tokenizer-type GPT2BPETokenizer|--tokenizer-model hf/tokenizer.model|--tokenizer-type none
--attention-backend local|--attention-backend flash|--spec local|--num-experts 4|--multi-latent-attention
--use-megatron-fsdp|--cuda-graph-impl local|--freeze-all-layers|--load base|--load nowhere|--save base
--save text.jsonl|--save-interval 0|--save-interval -1|--ckpt-format torch|--ckpt-format paper|--async-save
--no-load-optim|--finetune|--dmc-stage retrofit|--dmc-stage consolidate|--dmc-stage shrink|--dmc-target-cr 0.5
--dmc-target-cr four|--dmc-window-size -1|--dmc-window 8|--dmc-temperature 0|--dmc-total-samples -4
--dmc-first-sample x|--dataloader-inter-document-masking|--dataloader-type cyclic|--dataloader-type batch
--num-workers x|--distributed-timeout-minutes x|--rampup-batch-size 2 2|--step-batch-size-schedule 0:4|--skip-train
--yaml-cfg text.jsonl|--log-interval 0|--tensorboard-dir text.jsonl|--optimizer sgd|--optimizer none
--init-method-std -1|--exit-interval 1|--use-checkpoint-args|--override-opt_param-scheduler
--use-checkpoint-opt_param-scheduler --override-opt_param-scheduler|--num-layers-per-virtual-pipeline-stage 1
--decoder-first-pipeline-num-layers 1|--rotary-base 5|--rotary-percent 0.3|--untie-embeddings-and-output-weights
--disable-bias-linear|--add-bias-linear|--swiglu|--vocab-size 7|--seed x"""
OTHERS = """--seq-length 0|--seq-length 99999|--sequences 0|--sequences 99999999999999999999999|--batch-size -1
--path decode|--path fast|--prefill-length 17|--block-size 0|--block-size 3|--dtype bfloat16|--dtype int3
--device cuda|--device abacus|--policy h2o|--policy tova|--policy none|--model nowhere|--model text.jsonl
--model base|--data nowhere|--data text.jsonl|--text text.jsonl|--text hf|--tokenizer nowhere|--tokenizer text.jsonl
--tokenizer base|--json|--prompt|--prompt  --json|--prompts-file text.jsonl|--prompts-file hf|--max-new-tokens 0
--max-new-tokens 9999|--temperature -1|--top-p 2|--top-k -3|--min-p 2
--repetition-penalty 0|--repetition-penalty nan|--stop|--stop  --json
--n 0|--n 2|--logprobs 2|--logprobs -1|--prompt-logprobs|--prefill-chunk 0|--prefill-chunk 1|--memory-fraction 0
--memory-fraction 1|--memory-fraction x|--system be|--chat-template text.jsonl|--chat-template nowhere|--seed x
--num-blocks 0|--max-sequences 0|--output hf
--reference none|--reference nowhere|--reference hf|--reference base|--lengths 8,16|--lengths 0|--lengths x
--match-tokens 3|--match-tokens -1|--match-prompts 0|--tokens-trained -1|--tasks piqa|--tasks chess|--depths 0|--seeds x
--data-dir data|--limit 0|--chat
--output data|--output text.jsonl|--output /proc/none/x|--workers 0|--workers x|--split 1,1|--split 0,0,0|--split x
--json-key nothing|--skip-bad-lines|--overwrite|--dry-run|--max-memory 3|--max-memory much|--layout none
--dtype float99|--transformer-impl none|--no-hashes|--ignore-setting x|--num-kv-heads 3|--kv-dtype int4"""
VALUES = (
    "",
    "x",
    "-1",
    "0",
    "1e999",
    "nan",
    "99999999999999999999",
    "nowhere",
    "hf",
    "base",
    "data",
    "text.jsonl",
    "/",
    "\u2028",
)


def command_lines(count: int, seed: int) -> list[list[str]]:
    """``count`` lines, every command in turn, each with one to three slips."""
    source = random.Random(seed)
    names = list(RIGHT)
    # As many runs of training as of everything else.
    kinds = [
        names[number // 2 % 3] if number % 2 else names[3 + number // 2 % (len(names) - 3)] for number in range(count)
    ]
    return [_with_slips(RIGHT[kind].split(), kind, source) for kind in kinds]


def _with_slips(words: list[str], kind: str, source: random.Random) -> list[str]:
    extra = MEGATRON.replace("\n", "|").split("|") if kind.startswith("train") else _taken_by(kind)
    first = 1 if kind.startswith(("train", "eval", "generate", "chat", "report")) else 2
    for _ in range(source.randint(1, 3)):
        at = source.randrange(first, len(words))
        slip = source.choice(("more", "more", "more", "drop", "typo", "value", "twice"))
        if slip == "more":
            words = words + source.choice(extra).split(" ")
        elif slip == "drop" and len(words) > first + 1:
            words = words[:at] + words[at + 1 :]
        elif slip == "typo" and len(words[at]) > 3:
            letter = source.randrange(2, len(words[at]) - 1)
            words = [*words[:at], words[at][:letter] + words[at][letter + 1] + words[at][letter:], *words[at + 1 :]]
        elif slip == "value":
            words = [*words[:at], source.choice(VALUES), *words[at + 1 :]]
        else:
            words = words + words[at : at + 2]
    return words


def _taken_by(kind: str) -> list[str]:
    """Those of the other flags that a command has."""
    parser: argparse.ArgumentParser = build_parser()
    for name in kind.split():
        parser = next(part.choices for part in parser._actions if isinstance(part.choices, dict))[name]
    known = parser._option_string_actions
    return [flags for flags in OTHERS.replace("\n", "|").split("|") if flags.split(" ")[0] in known]
